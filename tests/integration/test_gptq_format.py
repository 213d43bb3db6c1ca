"""Exports in GPTQ's format: bits by hand, what verify finds, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_quant import LayerRule, QuantConfig, attach
from lightning_quant.attach import quant_layers
from lightning_quant.export import check_export, export, verify
from lightning_quant.export.gptq import pack, unpack
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm


def exported(tmp_path: Path, family: str = "llama", tied: bool = False, scheme: str = "w4a16-g32"):
    config = QuantConfig.parse("lsq", scheme, target="gptq")
    model = train_a_little(causal_lm(family, tied), config)
    report = export(model, tmp_path / "out", config=config)
    assert report.format == "gptq"
    return model, tmp_path / "out"


@pytest.mark.parametrize(
    ("family", "tied", "scheme"),
    [
        ("llama", False, "w4a16-g32"),
        ("llama", True, "w8a16"),
        ("qwen2", False, "w4a16-channel"),
        ("opt", True, "w8a16-g64"),
    ],
)
def test_the_file_holds_what_was_trained(tmp_path, family, tied, scheme):
    model, out = exported(tmp_path, family, tied, scheme)
    report = verify(out, model)
    assert report.ok, str(report)
    assert report.max_abs_diff == 0.0
    assert any("a reader of our own" in note for note in report.notes)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    size = {"w4a16-g32": 32, "w8a16-g64": 64}.get(scheme, -1)
    bits = int(scheme[1])
    assert said == {
        "quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": True, "lm_head": False,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    tensors = load_file(out / "model.safetensors")
    for path, layer in quant_layers(model):
        rows, width = layer.weight.shape
        groups = width // size if size > 0 else 1
        words, zeros = tensors[f"{path}.qweight"], tensors[f"{path}.qzeros"]
        scales, group = tensors[f"{path}.scales"], tensors[f"{path}.g_idx"]
        assert (words.shape, words.dtype) == ((width * bits // 32, rows), torch.int32)
        assert (zeros.shape, zeros.dtype) == ((groups, rows * bits // 32), torch.int32)
        assert set(zeros.flatten().tolist()) == {0x77777777 if bits == 4 else 0x7F7F7F7F}
        assert (scales.shape, scales.dtype) == ((groups, rows), torch.float16)
        assert group.tolist() == [i // (width // groups) for i in range(width)]
        # one weight by hand: word 1 of column 2, its second field
        field = (int(words[1, 2]) >> bits) & (2**bits - 1)
        row = 32 // bits + 1
        real = (field - 2 ** (bits - 1)) * float(scales[group[row], 2])
        assert real == float(layer.on_grid()[2, row])


@pytest.mark.parametrize("bits", [4, 8])
def test_words(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(codes.to(torch.int8), bits), bits), codes.T.int() + 2 ** (bits - 1))


EDITS = {
    "code": ("model.layers.0.mlp.up_proj.qweight", 1 << 8, "model.layers.0.mlp.up_proj: 1 integers"),
    "zero": ("model.layers.0.mlp.up_proj.qzeros", 1, "model.layers.0.mlp.up_proj: 1 integers"),
    "scale": ("model.layers.1.self_attn.o_proj.scales", 0.01, "o_proj: 0 integers, d scale 0.01"),
    "group": ("model.layers.1.self_attn.o_proj.g_idx", 1, "o_proj: 1 integers"),
    "norm": ("model.norm.weight", 1, "model.norm.weight: differs"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("gptq"))


@pytest.mark.parametrize("edit", EDITS)
def test_verify_names_what_differs(tmp_path, shared, edit):
    model, out = shared
    name, change, message = EDITS[edit]
    file = shutil.copytree(out, tmp_path / "out") / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[0] += change
    save_file(tensors, file)
    bad = verify(tmp_path / "out", model)
    assert not bad.ok
    assert bad.max_abs_diff > 0
    assert message in str(bad)


def test_settings_that_were_changed_are_found(tmp_path, shared):
    model, out = shared
    file = shutil.copytree(out, tmp_path / "out") / "config.json"
    file.write_text(file.read_text().replace('"desc_act": false', '"desc_act": true'))
    assert "config.json: quantization_config" in verify(tmp_path / "out", model).other


REFUSED = {
    "half": ("w4a16-g32", {"target": "vllm"}, "expected scales in half precision.*Train with target='gptq'"),
    "inputs": ("w4a8-g32", {}, r"expected float inputs, got 8 bits\. Train with a16"),
    "asymmetric": ("w4a16-g32-asym", {}, "expected integers of 4 or 8 bits around 0"),
    "width": ("w3a16-g32", {}, "expected integers of 4 or 8 bits around 0, .*3 bits"),
    "head": ("w4a16-g32", {"head": True}, "lm_head .*expected an output head in float"),
    "float layer": (
        "w4a16-g32",
        {"rules": [LayerRule("*.up_proj", weight=None)]},
        "up_proj .*every Linear layer but the head quantized, got one in float",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    scheme, options, message = REFUSED[case]
    attach(model := causal_lm(), QuantConfig.parse("ste", scheme, **{"target": "gptq", **options}))
    with pytest.raises(ValueError, match=message):
        check_export(model, "gptq")


def test_layers_of_two_schemes_are_refused():
    wide = QuantConfig.parse("ste", "w8a16", target="gptq").weight
    rules = [LayerRule("*.down_proj", weight=wide)]
    attach(model := causal_lm(), QuantConfig.parse("ste", "w4a16-g32", target="gptq", rules=rules))
    with pytest.raises(ValueError, match=r"down_proj .*expected 4 bits in groups of 32, as \S*q_proj, got 8 in -1"):
        check_export(model, "gptq")
