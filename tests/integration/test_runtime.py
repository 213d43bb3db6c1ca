"""Exports run on the low-bit kernels: what is loaded, what it computes beside transformers' reader, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightning_quant import LayerRule, QuantConfig, attach, runtime
from lightning_quant.cli import main
from lightning_quant.errors import CheckpointError
from lightning_quant.export import export
from lightning_quant.runtime import LowBitLinear

VOCAB = 96
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "mixtral": (MixtralForCausalLM, MixtralConfig),
}


def exported(path: Path, scheme: str, family: str = "llama", dtype=torch.bfloat16, rules=(), **extra) -> Path:
    """An export of a random model that is wide enough for the kernels, in small shards."""
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    model = kind(config(**sizes, initializer_range=0.06, **extra)).to(dtype).eval()
    quant = QuantConfig.parse("ste", scheme, target="transformers", rules=list(rules))
    attach(model, quant)
    export(model, path, config=quant, max_shard_bytes=300_000)
    return path


CASES = [
    ("llama", "w4a16-g128", {}, {"int4"}, True),
    ("qwen2", "w4a16-g32", {"tie_word_embeddings": True}, {"int4"}, True),
    ("qwen2", "w8a16", {}, {"int8"}, True),
    ("llama", "w8a8", {"tie_word_embeddings": True}, {"w8a8"}, False),
    ("llama", "w3a16-g32", {}, {"int4"}, True),
    ("llama", "w5a16-g32", {}, {"dense"}, True),
    ("llama", "w4a8-g32", {}, {"dense"}, False),
    ("mixtral", "w4a16-g32", {"num_local_experts": 4}, {"int4", "dense"}, True),
]


@pytest.mark.parametrize(("family", "scheme", "extra", "kernels", "weight_only"), CASES)
def test_it_computes_what_the_reader_computes(tmp_path, family, scheme, extra, kernels, weight_only):
    path = exported(tmp_path / "out", scheme, family, **extra)
    reader = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    fast = runtime.load(path)
    assert {line.kernel for line in fast.runtime_report.lines} == kernels
    assert str(runtime.plan(path)) == str(fast.runtime_report)
    assert not any(p.is_meta for p in fast.parameters())
    low_bit = sum(isinstance(m, LowBitLinear) for m in fast.modules())
    assert low_bit == sum(line.kernel != "dense" for line in fast.runtime_report.lines)
    torch.manual_seed(0)
    many, few = torch.randint(3, VOCAB, (4, 60)), torch.randint(3, VOCAB, (1, 6))
    for ids in (many, few):
        with torch.no_grad():
            expected, found = reader(input_ids=ids).logits.float(), fast(input_ids=ids).logits.float()
        error = (found - expected).norm() / expected.norm()
        assert error < (0.02 if weight_only else 0.05)  # bfloat16; rounding of inputs doubles what differs
    tokens = [m.generate(few, max_new_tokens=16, do_sample=False)[:, 6:] for m in (reader, fast)]
    assert tokens[0].shape == (1, 16)
    with torch.no_grad():  # each of its tokens is a best one for the reader too, up to the difference of the logits
        logits = reader(input_ids=torch.cat([few, tokens[1]], dim=1)).logits[0, 5:-1].float()
    lost = logits.max(dim=-1).values - logits.gather(1, tokens[1][0][:, None])[:, 0]
    assert lost.max() <= 0.05 * logits.abs().max()


def test_float32_runs_dense_and_exactly(tmp_path):
    path = exported(tmp_path / "out", "w4a16-g32", dtype=torch.float32)
    reader, fast = AutoModelForCausalLM.from_pretrained(path).eval(), runtime.load(path, dtype=torch.float32)
    assert {line.reason for line in fast.runtime_report.lines} == {"the kernels compute in bfloat16, not float32"}
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(reader(input_ids=ids).logits, fast(input_ids=ids).logits)


def test_schemes_of_single_layers(tmp_path):
    rules = [LayerRule("*.down_proj", weight="w8-channel"), LayerRule("*.0.self_attn.q_proj", weight=None)]
    fast = runtime.load(exported(tmp_path / "out", "w4a16-g32", rules=rules))
    kernels = {line.path: line.kernel for line in fast.runtime_report.lines}
    assert kernels["model.layers.1.mlp.down_proj"] == "int8"
    assert kernels["model.layers.1.self_attn.q_proj"] == "int4"
    assert "model.layers.0.self_attn.q_proj" not in kernels
    assert type(fast.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def edited(path: Path, **changes) -> Path:
    config = json.loads((path / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization.update({k: v for k, v in changes.items() if k in ("quant_method", "kv_cache_scheme")})
    for group in quantization["config_groups"].values():
        group["weights"].update(changes.get("weights", {}))
    (path / "config.json").write_text(json.dumps(config))
    return path


REFUSED = [
    ({"quant_method": "gptq"}, "expected a compressed-tensors checkpoint, got gptq"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "a key-value cache in float"),
    ({"weights": {"type": "float"}}, "group_0: expected integer weights"),
    ({"weights": {"actorder": "group"}}, "in their own order"),
]


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("int4") / "out", "w4a16-g32")


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_computed_is_refused(tmp_path, int4, changes, message):
    path = edited(Path(shutil.copytree(int4, tmp_path / "copy")), **changes)
    with pytest.raises(ValueError, match=message):
        runtime.load(path)


def test_damage_is_found(tmp_path, int4):
    with pytest.raises(CheckpointError, match=r"a directory with config\.json"):
        runtime.load(tmp_path)
    path = Path(shutil.copytree(int4, tmp_path / "copy"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    file = path / index["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected shape \(256,\), got \(255,\)"):
        runtime.load(path)
    del index["weight_map"]["model.norm.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected a tensor for model\.norm\.weight, got none"):
        runtime.load(path)
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.other"] = file.name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({**tensors, "model.norm.weight": norm, "model.other": norm.clone()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected tensors of LlamaForCausalLM, got model\.other"):
        runtime.load(path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="a whole safetensors file"):
        runtime.load(path)


def test_command_line_wants_a_tokenizer(int4, capsys):
    assert main(["generate", str(int4), "--prompt", "x"]) == 2
    assert "tokenizer" in capsys.readouterr().err
