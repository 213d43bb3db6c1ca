from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_quant import LayerRule, QuantConfig, TensorSpec, attach, calibrate, detach
from lightning_quant.attach import quant_layers
from lightning_quant.cli import main
from lightning_quant.errors import CheckpointError
from lightning_quant.export import export, verify
from tests.integration.tiny import causal_lm, token_batch

SCHEMES = ["w4a16-g32", "w4a16-channel", "w8a16", "w8a8", "w8a8-static", "w2a16-g32", "w4a8-g32"]


def train_a_little(model, config):
    """A few real steps, so that scales, Theta and weights are trained ones, then eval."""
    from lightning_quant import QuantController, param_groups

    controller = QuantController(config)
    controller.prepare(model)
    controller.begin(4)
    optimizer = torch.optim.AdamW(param_groups(model, config, 1e-3))
    model.train()
    for step in range(4):
        controller.on_step(step)
        batch = token_batch(seed=step)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        controller.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        controller.after_optimizer_step()
    controller.on_eval()
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reader_computes_exactly_what_training_computed(tmp_path, family, tied, scheme):
    config = QuantConfig.parse("pege", scheme, target="transformers", calibration=2)
    model = train_a_little(causal_lm(family, tied), config)
    export(model, tmp_path / "out", config=config)
    reader, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    batch = token_batch(rows=3, seed=9)
    with torch.no_grad():
        expected, found = model(**batch).logits, reader(**batch).logits
    assert torch.equal(expected, found)
    detach(model)
    assert not torch.equal(expected, causal_lm(family, tied)(**batch).logits)


@pytest.mark.parametrize("scheme", ["w4a16-g32-asym", "w8a16-asym", "w3a16-channel-asym", "fp8a16", "fp8", "nvfp4a16"])
def test_zero_points_and_float_grids_are_exact_in_the_reader(tmp_path, scheme):
    config = QuantConfig.parse("lsq", scheme, target="transformers")
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", model)
    assert (report.ok, report.max_abs_diff, report.notes) == (True, 0.0, [])
    data = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert data.get("dequantize", False) == (config.activation is None)


@pytest.mark.parametrize("scheme", ["mxfp4a16", "mxfp4", "mxfp8a16", "mxfp8"])
def test_microscaling_weights_are_exact_and_its_reader_leaves_inputs_alone(tmp_path, scheme):
    config = QuantConfig.parse("ste", scheme)
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", model)
    assert (report.ok, report.max_abs_diff) == (True, 0.0)
    assert ("compared without input quantizers" in " ".join(report.notes)) == (config.activation is not None)
    scale = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"]
    assert (scale.dtype, scale.shape) == (torch.uint8, (128, 2))


def test_static_inputs_with_a_zero_point(tmp_path):
    inputs = TensorSpec(8, symmetric=False, dynamic=False)
    config = QuantConfig("ste", TensorSpec(8), inputs, target="transformers", calibration=2)
    model = train_a_little(causal_lm(), config)
    assert any(float(layer.input_quant.zero) for _, layer in quant_layers(model))
    export(model, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", model)
    assert (report.ok, report.max_abs_diff) == (True, 0.0)


def test_a_quantized_head_is_named_for_readers_that_have_no_linear_there(tmp_path):
    config = QuantConfig.parse("ste", "w4a16-g32", head=True)
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    data = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert data["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert data["ignore"] == []
    assert verify(tmp_path / "out", model).ok


def test_a_changed_setting_or_a_tensor_nobody_trained_is_found(tmp_path):
    config = QuantConfig.parse("ste", "w4a16-g32")
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    file = tmp_path / "out" / "config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "rms_norm_eps": 1e-5}))
    assert "config.json: rms_norm_eps" in verify(tmp_path / "out", model).other
    file.write_text(json.dumps(data))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"] = torch.zeros(2)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="clean loading report"):
        verify(tmp_path / "out", model)


def test_verify_accepts_and_compares_every_layer(tmp_path):
    config = QuantConfig.parse("pege", "w4a16-g32")
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", model)
    assert report.ok
    assert report.max_abs_diff == 0.0
    assert {c.path for c in report.layers} == {p for p, _ in quant_layers(model)}
    assert all(c.output_diff == 0.0 for c in report.layers)


def test_verify_says_which_dynamic_rule_was_compared(tmp_path):
    config = QuantConfig.parse("ste", "w8a8", target="vllm")
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", model)
    assert report.ok
    assert "127.5" in report.notes[0]


def damaged(tmp_path: Path, edit) -> Path:
    """A copy of a good export with its tensors edited."""
    out = tmp_path / "bad"
    shutil.copytree(tmp_path / "out", out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def swap(tensors):
    a, b = (f"model.layers.{i}.mlp.down_proj.weight_packed" for i in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]


EDITS = {
    "nibble": (lambda t: t["model.layers.1.mlp.up_proj.weight_packed"].view(-1)[:1].bitwise_xor_(1), "1.mlp.up"),
    "scale": (lambda t: t["model.layers.0.self_attn.q_proj.weight_scale"].view(-1)[3:4].mul_(1.001), "0.self_attn.q"),
    "swap": (swap, "0.mlp.down_proj"),
    "norm": (lambda t: t["model.norm.weight"].add_(1e-3), "model.norm.weight"),
}


@pytest.mark.parametrize("name", EDITS)
def test_verify_finds_a_damaged_export_and_names_the_layer(tmp_path, name):
    config = QuantConfig.parse("ste", "w4a16-g32")
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    edit, where = EDITS[name]
    report = verify(damaged(tmp_path, edit), model)
    assert not report.ok
    assert where in str(report.first_difference)
    assert where in str(report)


def test_streaming_in_shards_loads_the_same(tmp_path):
    config = QuantConfig.parse("ste", "w4a16-g32")
    model = train_a_little(causal_lm(), config)
    report = export(model, tmp_path / "out", config=config, max_shard_bytes=20_000)
    assert len(report.files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    assert verify(tmp_path / "out", model).ok
    assert report.total_bytes < report.float_bytes


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w1.58a16-channel", "w1a16-g32", "w4a16-g32-asym"])
def test_folded_loads_as_a_plain_float_checkpoint(tmp_path, scheme):
    config = QuantConfig.parse("lsq", scheme)
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", format="folded", config=config)
    reader, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    batch = token_batch()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, reader(**batch).logits)
    assert verify(tmp_path / "out", model).ok


def test_folded_module_without_transformers(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    attach(net, QuantConfig.parse("ste", "w4a16"))
    x = torch.randn(2, 1, 8, 8)
    export(net, tmp_path / "out", config=QuantConfig.parse("ste", "w4a16"))
    assert verify(tmp_path / "out", net, inputs={"input": x}).ok
    expected = net.eval()(x)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(plain(x), expected)


def test_mixed_grids_name_their_layers(tmp_path):
    rules = (LayerRule("*.down_proj", weight="w8-channel"), LayerRule("*.q_proj", weight=None))
    config = QuantConfig.parse("ste", "w4a16-g32", rules=rules)
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    data = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(data["config_groups"]) == 2
    assert set(data["ignore"]) == {"lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))}
    assert verify(tmp_path / "out", model).ok


def test_bf16_weights_and_scales_are_the_readers(tmp_path):
    config = QuantConfig.parse("lsq", "w4a16-g32")
    model = train_a_little(causal_lm().to(torch.bfloat16), config)
    export(model, tmp_path / "out", config=config)
    reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reader(**token_batch())
    for path, layer in quant_layers(model):
        assert torch.equal(reader.get_submodule(path).weight, layer.weight_quant.on_grid(layer.weight)), path


REFUSED = {
    "gpt2": ("w4a16-channel", {}, "a Linear layer"),
    "one bit": ("w1a16-g32", {}, "integers around a zero point, or fp8"),
    "seven bits": ("w7a16-g32", {}, "2 to 6 or 8 bits"),
    "a codebook": ("nf4-g32", {}, "integers around a zero point, or fp8"),
    "offset weights": ("w4a16-g32", {"range": "offset"}, "integers around a zero point, or fp8"),
    "asymmetric beside int8": ("w4a8-g32-asym", {}, "symmetric weights"),
    "nvfp4 inputs": ("nvfp4", {}, "inputs in float beside nvfp4 weights"),
    "unpacked among others": ("w4a16-g32-asym", {"rules": (LayerRule("*.down_proj", "w8"),)}, "one scheme where"),
    "grouped int8": ("w8a8-g32", {}, "per-channel weights"),
    "four-bit inputs": ("w4a4-g32", {}, "8-bit inputs"),
    "tied head": ("w4a16-g32", {"head": True}, "a weight of its own"),
    "other target": ("w8a8", {"target": "transformers"}, "which training followed"),
    "uncalibrated": ("w8a8-static", {}, "calibrated inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_readers_cannot_load_is_refused_before_a_byte_is_written(tmp_path, name):
    scheme, options, message = REFUSED[name]
    model = causal_lm(tied=name == "tied head")
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2))
    attach(model, QuantConfig.parse("ste", scheme, **options))
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", format="compressed-tensors", target="vllm")
    assert list(tmp_path.iterdir()) == []


def test_static_inputs_by_calibration_alone(tmp_path):
    model = causal_lm()
    attach(model, QuantConfig.parse("ste", "w8a8-static"))
    assert calibrate(model, [token_batch(seed=i) for i in range(3)]) == 3
    export(model, tmp_path / "out")
    assert verify(tmp_path / "out", model).ok


def test_existing_directory_is_left_alone(tmp_path):
    model = causal_lm()
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match=r"does not exist yet, got an existing one\. Choose another"):
        export(model, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_float_model_and_unknown_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a model with quantizers, got a float model"):
        export(causal_lm(), tmp_path / "out")
    model = causal_lm()
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    with pytest.raises(ValueError, match="Did you mean format 'folded'"):
        export(model, tmp_path / "out", format="foldd")


def test_truncated_export_is_a_clear_error_and_status_2(tmp_path, capsys):
    config = QuantConfig.parse("ste", "w4a16-g32")
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: expected a whole safetensors file, got .*Export again"
    ):
        verify(tmp_path / "out", model)
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path)]) == 2
    assert "expected a whole safetensors file" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="an export, got no such directory"):
        verify(tmp_path / "nothing", model)
