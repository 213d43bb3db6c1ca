"""Layers are measured one by one, and the chosen widths train and export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quant import LayerRule, QuantConfig, attach, detach
from lightning_quant.attach import is_attached, quant_layers, quantizers
from lightning_quant.cli import main
from lightning_quant.export import export, verify
from lightning_quant.sensitivity import sensitivity
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm, token_batch

SCHEMES = ("w2a16-g32", "w4a16-g32", "w8a16-g32")


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{**token_batch(seed=i), "labels": token_batch(seed=i)["input_ids"]} for i in range(count)]


@pytest.fixture(scope="module")
def measured():
    model = causal_lm()
    return model, sensitivity(model, batches(), SCHEMES, config=QuantConfig("ste"))


def test_a_figure_is_that_of_the_model_with_one_layer_quantized(measured):
    _, found = measured
    group = ("model.layers.1.mlp.down_proj",)
    rules = [LayerRule(group[0]), LayerRule("*", weight=None)]
    reference = causal_lm()
    own = [reference(**b).logits for b in batches()]
    attach(reference.eval(), QuantConfig.parse("ste", "w2a16-g32", rules=rules))
    pairs = zip(batches(), own, strict=True)
    kl = [
        torch.distributions.kl_divergence(
            *(torch.distributions.Categorical(logits=x) for x in (y, reference(**b).logits))
        )
        for b, y in pairs
    ]
    want = torch.stack([k.mean() for k in kl]).mean()
    assert found.losses[found.groups.index(group)][0] == pytest.approx(float(want.detach()), rel=1e-4)
    assert found.baseline == pytest.approx(0, abs=1e-7)


def test_the_model_is_left_as_it_was(measured):
    model, _ = measured
    assert not is_attached(model)
    assert torch.equal(model(**token_batch()).logits, causal_lm()(**token_batch()).logits)


def test_fewer_bits_lose_more_and_fused_layers_go_together(measured):
    _, found = measured
    assert (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
    ) in (found.groups)
    assert all(row[0] > row[1] > row[2] >= -1e-6 for row in found.losses)
    weights = sum(
        p.numel() for n, p in causal_lm().named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n
    )
    assert sum(found.numbers) == weights
    assert [b / n for b, n in zip(found.bits[0], [found.numbers[0]] * 3, strict=True)] == [2.5, 4.5, 8.5]
    assert "down_proj" in str(found)
    assert found.to_dict()["schemes"] == list(SCHEMES)


@pytest.mark.parametrize("exact", [True, False])
def test_a_recipe_keeps_its_budget_trains_and_exports(measured, tmp_path, exact):
    _, found = measured
    rules = found.recipe(bits=4.0, exact=exact)
    assert found.stored(rules) <= 4.0
    config = QuantConfig.parse("lsq", "w4a16-g32", rules=rules)
    model = train_a_little(causal_lm(), QuantConfig.from_dict(config.to_dict()))
    widths = {p: layer.weight_quant.spec.bits for p, layer in quant_layers(model)}
    assert len(set(widths.values())) > 1
    assert widths["model.layers.0.self_attn.q_proj"] == widths["model.layers.0.self_attn.k_proj"]
    export(model, tmp_path / "out", target="vllm", config=config)
    assert verify(tmp_path / "out", model).ok


def test_mixed_widths_lose_less_than_one_width_of_as_many_bits(measured):
    model, found = measured
    rules = found.recipe(bits=4.5)
    data = batches()
    losses = {}
    for name, own in (("one", ()), ("mixed", rules)):
        attach(model, QuantConfig.parse("ste", "w4a16-g32", rules=own))
        with torch.no_grad():
            logits = [model(**b).logits for b in data]
            for _, q in quantizers(model):
                q.enabled = False
            losses[name] = sum(
                float((x - model(**b).logits).square().mean()) for x, b in zip(logits, data, strict=True)
            )
        detach(model, fold=False)
    assert losses["mixed"] <= losses["one"] * 1.02


def test_other_metrics():
    found = sensitivity(causal_lm(), batches(1), ("w2a16-g32",), metric="loss")
    assert found.baseline == pytest.approx(float(causal_lm()(**batches(1)[0]).loss.detach()), rel=1e-5)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    found = sensitivity(net, [torch.randn(64, 32)], ("w2a8-channel-static", "w8a8-static"), metric="mse")
    assert list(found.groups) == [("0",), ("2",)]
    assert all(row[0] > row[1] for row in found.losses)


def test_the_command_writes_a_recipe_that_trains(tmp_path, capsys):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from causal_lm import read_text, train_tokenizer

    tokenizer = train_tokenizer(read_text(None)[:50_000], 300)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["sensitivity", str(tmp_path / "model"), "--schemes", ",".join(SCHEMES), "--samples", "2", "--length", "16"]
    out, figures, plot = (str(tmp_path / name) for name in ("recipe.yaml", "figures.json", "plot.png"))
    assert main([*words, "--bits", "4.0", "--out", out, "--json", figures, "--plot", plot, "--method", "lsq"]) == 0
    printed = capsys.readouterr().out
    assert "bits per weight" in printed
    assert "model.layers.0.mlp.up_proj: w" in printed
    assert json.loads(Path(figures).read_text())["metric"] == "kl"
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    config = QuantConfig.from_yaml(out)
    model = train_a_little(causal_lm(), config)
    assert {layer.weight_quant.spec.bits for _, layer in quant_layers(model)} <= {2, 4, 8}
    assert main([*words, "--out", out]) == 2
    assert "expected --bits as well, got none" in capsys.readouterr().err
    assert main(["sensitivity", str(tmp_path)]) == 2
    assert "expected a causal language model" in capsys.readouterr().err


def test_bad_input():
    net = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"sensitivity: expected one of kl, loss, mse, got 'sqnr'"):
        sensitivity(net, [torch.randn(2, 32)], metric="sqnr")
    with pytest.raises(ValueError, match="a batch and a scheme at least, got 0 batches"):
        sensitivity(net, [])
    with pytest.raises(ValueError, match="a model that returns its loss"):
        sensitivity(causal_lm(), [token_batch()], ("w4a16-g32",), metric="loss")
    found = sensitivity(net, [torch.randn(2, 32)], ("w4a16-g32",), metric="mse")
    with pytest.raises(ValueError, match="expected a budget of"):
        found.recipe(3.0)
