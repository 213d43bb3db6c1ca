"""The roofline's bytes are those of real exports, and the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from lightning_quant import LayerRule, QuantConfig, TensorSpec, attach
from lightning_quant.attach import quantizers
from lightning_quant.cli import main
from lightning_quant.export import export
from lightning_quant.roofline import measure, open_model, stored

COMMON: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
GATED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 160}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GATED, architectures=["LlamaForCausalLM"]),
    "qwen2, tied": transformers.Qwen2Config(**GATED, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"]),
    "gemma": transformers.GemmaConfig(**GATED, head_dim=16, architectures=["GemmaForCausalLM"]),
    "opt": transformers.OPTConfig(**COMMON, ffn_dim=160, word_embed_proj_dim=64, architectures=["OPTForCausalLM"]),
    "mixtral": transformers.MixtralConfig(**GATED, num_local_experts=4, architectures=["MixtralForCausalLM"]),
    "bert": transformers.BertConfig(**COMMON, intermediate_size=160, architectures=["BertForMaskedLM"]),
}
SCHEMES = ("w4a16-g32", "w8a16", "w8a8", "w4a16-g32-asym", "w3a16-channel")


def export_of(directory: Path, config: QuantConfig) -> Path:
    """A real export of a model with this directory's config.json and random weights."""
    own = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, own.architectures[0])
    torch.manual_seed(0)
    model = kind._from_config(own, dtype=own.dtype).eval()
    attach(model, config)
    for _, q in quantizers(model):
        if not q.ready:  # static inputs, which no batch has gone through
            q.set_range(torch.tensor([-1.0]), torch.tensor([1.0]))
    export(model, directory / "out", format="compressed-tensors", config=config)
    return directory / "out"


def bytes_of(path: Path) -> int:
    """Of the tensors in a directory's files."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found = [tensors.get_tensor(key) for key in tensors.keys()]  # noqa: SIM118
        total += sum(t.numel() * t.element_size() for t in found)
    return total


def directory_of(place: Path, name: str, dtype: str = "bfloat16") -> Path:
    config = CONFIGS[name]
    config.dtype = dtype
    config.save_pretrained(place)
    return place


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_are_those_of_the_export(tmp_path, name, scheme):
    config = QuantConfig.parse("ste", scheme)
    directory = directory_of(tmp_path, name)
    predicted = stored(open_model(directory), config)
    assert predicted.total == bytes_of(export_of(directory, config))
    assert predicted.parts["codes"] > 0.3 * predicted.total  # the rest does not drown them


FURTHER = {
    "float32": ("llama", "w4a16-g32", "float32", {}),
    "static inputs": ("llama", "w8a8-static", "bfloat16", {}),
    "keys and values": ("qwen2, tied", "w8a16-kv8", "bfloat16", {}),
    "fp8": ("opt", "fp8", "float16", {}),
    "mxfp4": ("gemma", "mxfp4a16", "bfloat16", {}),
    "nvfp4": ("mixtral", "nvfp4a16", "bfloat16", {}),
    "ends on their own": ("llama", "w4a16-g32", "bfloat16", {"first_last": "w8a16", "head": True}),
    "rules": (
        "llama",
        "w4a16-g32",
        "bfloat16",
        {"rules": (LayerRule("*.down_proj", TensorSpec.parse("w8")), LayerRule("*.0.*.q_proj", weight=None))},
    ),
}


@pytest.mark.parametrize("case", FURTHER)
def test_so_are_those_of_other_settings(tmp_path, case):
    name, scheme, dtype, options = FURTHER[case]
    config = QuantConfig.parse("ste", scheme, **options)
    directory = directory_of(tmp_path, name, dtype)
    assert stored(open_model(directory), config).total == bytes_of(export_of(directory, config))


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    directory = directory_of(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"expected integers around a zero point, or fp8, mxfp8.*got grid='nf4'"):
        stored(open_model(directory), QuantConfig.parse("ste", "nf4-g32"))
    with pytest.raises(ValueError, match="group_size=48 does not divide"):
        stored(open_model(directory), QuantConfig.parse("ste", "w4a16-g48"))


def test_a_model_of_seventy_billion_weights(tmp_path):
    """Without a weight of it: by the formula of its sizes."""
    own = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    own.save_pretrained(tmp_path)
    found = stored(open_model(tmp_path), QuantConfig.parse("ste", "w4a16-g128"))
    weights = 80 * (8192 * (8192 + 1024) * 2 + 3 * 8192 * 28672)
    assert found.parts["codes"] == weights // 2
    assert found.parts["scales"] == weights // 128 * 2
    assert found.parts["float"] == 2 * (2 * 128256 * 8192 + 161 * 8192)


def test_the_command(tmp_path, capsys):
    directory = directory_of(tmp_path, "llama")
    words = ["roofline", str(directory), "--hardware", "h100", "--scheme", "w4a16-g32", "--batch", "2"]
    words += ["--prompt", "16", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM, w4a16-g32, otherwise bfloat16, on H100 SXM\n")
    assert "Prompt (2 x 16 tokens): at least" in out
    assert "One more token (2 x 1 token after 16): at least" in out
    row = next(line for line in out.splitlines() if line.startswith("model.layers.*.mlp.up_proj"))
    assert row.split()[1:3] == ["2", "bfloat16"]
    assert row.split()[-1] == "memory"
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["total"]["weight_bytes"] == sum(layer["weight_bytes"] for layer in data["layers"])
    assert data["total"]["weight_bytes"] == sum(layer["weight_bytes"] for layer in data["groups"])
    assert {"prefill", "decode"} == {*data["total"]["phases"]}
    assert data["load"] == {"batch": 2, "prompt": 16, "context": 16}
    assert data["hardware"]["peak"]["bfloat16"] == 989e12


def test_an_export_and_hardware_of_ones_own(tmp_path, capsys):
    """Its quant_config.json says the scheme; weights beside it are not looked at."""
    path = export_of(directory_of(tmp_path, "qwen2, tied"), QuantConfig.parse("ste", "w8a8-kv8"))
    size = bytes_of(path)
    (path / "model.safetensors").unlink()
    file = tmp_path / "small.yaml"
    file.write_text("{name: small, peak: {bfloat16: 1e9, int8: 1e9}, bandwidth: 1e12, memory: 1000, source: mine}")
    assert main(["roofline", str(path), "--hardware", str(file), "--json", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "That does not fit into the 1 kB of small." in out
    assert "at 8 bits, 1 x 64 tokens" in out  # as many positions as there are
    row = next(line for line in out.splitlines() if line.startswith("model.layers.*.mlp.up_proj"))
    assert (row.split()[2], row.split()[-1]) == ("int8", "compute")
    assert json.loads((tmp_path / "r.json").read_text())["total"]["weight_bytes"] == size


def test_an_encoder_in_float(tmp_path, capsys):
    directory = directory_of(tmp_path, "bert")
    words = ["roofline", str(directory / "config.json"), "--hardware", "a6000", "--scheme", "w16", "--dtype", "float16"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "float16" in out
    assert "Keys and values" not in out
    assert "One more token" not in out


def test_on_this_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_quant.roofline.machine.measure", partial(measure, buffer=2**22, size=128))
    directory = directory_of(tmp_path, "llama")
    assert main(["roofline", str(directory), "--hardware", "cpu", "--scheme", "w8a16"]) == 0
    assert "on cpu\n" in capsys.readouterr().out


BAD = {
    "no scheme": ([], "expected a scheme, or quant_config.json in the directory, got none"),
    "a scheme": (["--scheme", "w9a16"], "scheme 'w9a16': expected the form"),
    "hardware": (["--scheme", "w8a8", "--hardware", "h10"], "Did you mean hardware 'h100'"),
    "a file": (["--scheme", "w8a8", "--hardware", "none.yaml"], "No such file"),
    "too long": (["--scheme", "w8a8", "--prompt", "65"], "expected at most 64 tokens, got 65"),
    "no tokens": (["--scheme", "w8a8", "--batch", "0"], "batch: expected 1 or more, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_status_2(tmp_path, capsys, name):
    words, message = BAD[name]
    directory = directory_of(tmp_path, "llama")
    assert main(["roofline", str(directory), "--hardware", "a100", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_no_model_there(tmp_path, capsys):
    assert main(["roofline", str(tmp_path), "--hardware", "a100", "--scheme", "w8a8"]) == 2
    assert "expected a config.json of transformers" in capsys.readouterr().err
