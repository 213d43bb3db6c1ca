"""Layers that a runtime fuses keep one range for their common input."""

from __future__ import annotations

import pytest
import torch

from lightning_quant import LayerRule, QuantConfig, attach
from lightning_quant.export import export, verify
from lightning_quant.fused import average, fused_layers, shared_inputs
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm

FIRST = "model.layers.0."


def test_the_layers_are_found_by_their_names_and_parents():
    model = causal_lm()
    groups = [list(group) for group in fused_layers(model, "vllm")]
    assert groups[:2] == [
        [f"{FIRST}self_attn.{n}_proj" for n in "qkv"],
        [f"{FIRST}mlp.gate_proj", f"{FIRST}mlp.up_proj"],
    ]
    assert len(groups) == 4
    assert fused_layers(model, "transformers") == []


@pytest.mark.parametrize(("target", "equal"), [("vllm", True), ("transformers", False)])
@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_learned_ranges_of_one_input_stay_one(method, target, equal):
    config = QuantConfig.parse(method, "w8a8-static", target=target, calibration=2, scale_lr=1.0)
    model = train_a_little(causal_lm(), config)
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{n}_proj").input_quant for n in "qkv")
    same = [torch.equal(a, b) for a, b in zip(q.range_parameters(), k.range_parameters(), strict=True)]
    assert same == [equal] * len(same)
    assert torch.equal(k.range.scale(k), v.range.scale(v)) == equal
    o = model.model.layers[0].self_attn.o_proj.input_quant
    assert not torch.equal(o.range.scale(o), q.range.scale(q))


def test_the_mean_is_what_a_shared_range_would_have_learned():
    model = causal_lm()
    attach(model, QuantConfig.parse("lsq", "w8a8-static"))
    group = shared_inputs(model)[0]
    for i, q in enumerate(group):
        q.scale.data.fill_(1.0 + i)
    average([group])
    assert [float(q.scale.detach()) for q in group] == [2.0, 2.0, 2.0]


def test_fixed_ranges_and_ranges_of_other_kinds_are_left_alone():
    model = causal_lm()
    attach(model, QuantConfig.parse("ste", "w8a8-static"))
    assert shared_inputs(model) == []
    model = causal_lm()
    attach(model, QuantConfig.parse("lsq", "w8a8-static", rules=[LayerRule("*.k_proj", weight=None)]))
    assert [len(group) for group in shared_inputs(model)] == [2, 2]


def test_an_export_for_the_runtime_refuses_unlike_partners(tmp_path):
    config = QuantConfig.parse("ste", "w4a16-g32", rules=[LayerRule("*.k_proj", weight=None)])
    model = train_a_little(causal_lm(), config)
    with pytest.raises(ValueError, match=r"0\.self_attn\.k_proj \(target='vllm'\): expected the scheme of .*q_proj"):
        export(model, tmp_path / "out", target="vllm")
    export(model, tmp_path / "out")
    assert verify(tmp_path / "out", model).ok


def test_an_export_for_the_runtime_refuses_ranges_that_parted(tmp_path):
    config = QuantConfig.parse("lsq", "w8a8-static", target="transformers", calibration=2, scale_lr=1.0)
    model = train_a_little(causal_lm(), config)
    with pytest.raises(ValueError, match=r"k_proj \(target='vllm'\): expected the range of .*q_proj's input"):
        export(model, tmp_path / "out", target="vllm")
