"""QLoRA on bitsandbytes' own layers: real bitsandbytes under real PEFT, trained on another grid, exported exactly."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from hf_integration import load_training_checkpoint
from lightning_quant import LayerRule, QuantConfig, attach, bnb, detach
from lightning_quant.attach import quant_layers
from lightning_quant.checkpoint import CONFIG_FILE, STATE_FILE
from lightning_quant.errors import AttachError
from lightning_quant.export import export, verify
from lightning_quant.packed import CompactLinear, pack
from tests.integration.processes import ROOT
from tests.integration.test_lora import fit, logits
from tests.integration.test_trainer import losses, make
from tests.integration.tiny import causal_lm, token_batch

pytestmark = [
    # PEFT 0.21 and transformers 5.23 still use the old names of activation checkpointing.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BASES = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 double": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model"
    causal_lm().save_pretrained(path)
    return path


def stored(directory: Path, base: str = "nf4 double", **settings: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=BASES[base], **settings)


def adapted(directory: Path, base: str = "nf4 double", prepare: bool = True, **settings: object) -> nn.Module:
    model = stored(directory, base)
    if prepare:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS, **settings}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model


def up_proj(model: nn.Module) -> nn.Module:
    return model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")


def dense(layer: nn.Module) -> torch.Tensor:
    """What bitsandbytes itself makes of its codes."""
    held = layer._parameters["weight"]
    if hasattr(held, "quant_state"):
        return functional.dequantize_4bit(held.data, held.quant_state)
    return functional.int8_vectorwise_dequant(held.data, layer.state.SCB if held.SCB is None else held.SCB)


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [layer.weight_quant.stored(layer.folded()[0])[0] for _, layer in quant_layers(model)]


@pytest.mark.parametrize("base", BASES)
def test_the_layer_rounds_what_bitsandbytes_holds_plus_the_adapters(directory, base):
    model = adapted(directory, base)
    lora = up_proj(model)
    held, w = lora.base_layer.weight, dense(lora.base_layer)
    error = (w - causal_lm().model.layers[0].mlp.up_proj.weight).norm() / w.norm()
    assert 0 < error < (0.15 if base != "int8" else 0.01)
    report = attach(model, QuantConfig.parse("lsq", "w4a16-g32"))
    assert not report.unsupported
    float_report = attach(causal_lm(), QuantConfig.parse("lsq", "w4a16-g32"))
    assert [e.share for e in report.attached] == [e.share for e in float_report.attached]
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    merged = (w + (b @ a) * 4.0).detach().requires_grad_()
    x, g = torch.randn(3, 64), torch.randn(3, 128)
    want = nn.functional.linear(x, lora.base_layer.weight_quant(merged))
    got = lora(x)
    assert torch.equal(got, want)
    got.backward(g)
    scale = lora.base_layer.weight_quant.scale
    found = scale.grad.clone()
    scale.grad = None
    want.backward(g)
    torch.testing.assert_close(a.grad, 4.0 * b.T @ merged.grad)
    torch.testing.assert_close(b.grad, 4.0 * merged.grad @ a.T)
    torch.testing.assert_close(found, scale.grad)
    assert lora.base_layer._parameters["weight"] is held  # the base stays what it was


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
@pytest.mark.parametrize("base", BASES)
def test_trained_merged_and_exported_logits_are_equal(tmp_path, directory, base, scheme):
    model = adapted(directory, base)
    config = fit(model, scheme=scheme)
    compact = [layer for _, layer in quant_layers(model) if isinstance(layer, CompactLinear)]
    assert len(compact) == 14  # with adapters and without
    before, trained = logits(model), codes(model)
    export(model, tmp_path / "out", config=config)
    assert torch.equal(logits(model), before)
    report = verify(tmp_path / "out", model)
    assert report.ok, report
    assert sum(c.codes_differ for c in report.layers) == 0
    assert report.max_abs_diff == 0.0
    reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reader), before)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "bitsandbytes" not in json.dumps(settings)

    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), before)
    assert all(torch.equal(a, b) for a, b in zip(trained, codes(merged), strict=True))
    export(merged, tmp_path / "merged", config=config)
    assert verify(tmp_path / "merged", merged).ok
    files = [tmp_path / name / "model.safetensors" for name in ("out", "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("case", [{"use_dora": True}, {"lora_dropout": 0.25}, {"use_rslora": True}, {"bias": "all"}])
def test_kinds_of_adapters(tmp_path, directory, case):
    model = adapted(directory, **case)
    config = fit(model, steps=3)
    before = logits(model)
    export(model, tmp_path / "out", config=config)
    assert verify(tmp_path / "out", model).max_abs_diff == 0.0
    assert torch.equal(logits(model.merge_and_unload()), before)


def test_folded_export_is_a_plain_float_checkpoint(tmp_path, directory):
    model = adapted(directory)
    config = fit(model, steps=3)
    export(model, tmp_path / "out", format="folded", config=config)
    assert verify(tmp_path / "out", model).max_abs_diff == 0.0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(load_file(directory / "model.safetensors"))


def test_detaching_after_the_merge_leaves_a_float_model_on_the_grid(tmp_path, directory):
    model = adapted(directory)
    fit(model, steps=3)
    before = logits(model)
    plain = detach(model.merge_and_unload())
    assert torch.equal(logits(plain), before)
    assert not any(isinstance(m, (Linear4bit, CompactLinear)) for m in plain.modules())
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), before)


@pytest.mark.parametrize("base", ["nf4 double", "int8"])
def test_attach_undone_is_peft_on_bitsandbytes_again(directory, base):
    model = adapted(directory, base).train()
    with torch.no_grad():
        before = model(**token_batch()).logits
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    with torch.no_grad():
        assert not torch.equal(model(**token_batch()).logits, before)
    assert set(state) <= set(model.state_dict())
    detach(model, fold=False)
    with torch.no_grad():
        assert torch.equal(model.train()(**token_batch()).logits, before)
    again = model.state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(again[k], v) for k, v in state.items())
    layer = up_proj(model)
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    assert type(layer.base_layer) is (Linear4bit if base != "int8" else Linear8bitLt)


def test_a_base_that_was_evaluated_first(tmp_path, directory):
    """On some processors bitsandbytes changes the order of its codes in evaluation; the next reader must know."""
    model = adapted(directory)
    logits(model)
    config = fit(model, steps=2)
    export(model, tmp_path / "out", config=config)
    assert verify(tmp_path / "out", model).max_abs_diff == 0.0
    w = up_proj(model).base_layer.weight
    assert (w - causal_lm().model.layers[0].mlp.up_proj.weight).norm() < 0.15 * w.norm()


@pytest.mark.parametrize("base", ["nf4 double", "int8"])
def test_layers_left_in_float_ship_dense(tmp_path, directory, base):
    """One with adapters, one without; PEFT's own merge would round the former to 4 bits once more."""
    rules = [LayerRule("*.v_proj", weight=None), LayerRule("*.gate_proj", weight=None)]
    model = adapted(directory, base)
    config = QuantConfig.parse("ste", "w4a16-g32", rules=rules)
    attach(model, config)
    v_proj = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    kinds = [type(m) for m in model.modules()]
    export(model, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", model)
    assert report.ok, report
    assert report.max_abs_diff == 0.0
    assert [type(m) for m in model.modules()] == kinds
    written = load_file(tmp_path / "out" / "model.safetensors")
    merged = dense(v_proj.base_layer) + v_proj.get_delta_weight("default")
    assert torch.equal(written["model.layers.0.self_attn.v_proj.weight"], merged)


def test_half_precision_bases(tmp_path, directory):
    """Prepared, the model computes in float32 around a bfloat16 base; without, all of it is in bfloat16."""
    for prepare in (True, False):
        model = stored(directory, dtype=torch.bfloat16)
        if prepare:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
        config = fit(model, "ste", steps=2)
        kind = torch.float32 if prepare else torch.bfloat16
        assert up_proj(model).base_layer.weight.dtype == kind
        with torch.autocast("cpu", torch.bfloat16, enabled=prepare):
            batch = token_batch()
            model.train()(**batch, labels=batch["input_ids"]).loss.backward()
        out = tmp_path / str(prepare)
        export(model, out, config=config)
        assert json.loads((out / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
        report = verify(out, model)
        assert sum(c.codes_differ for c in report.layers) == 0
        assert report.max_abs_diff == 0.0


def test_nothing_of_the_weight_s_size_is_kept_for_backward(directory):
    model = adapted(directory, target_modules=["q_proj"])
    attach(model, QuantConfig.parse("lsq", "w4a16-g32"))
    layers = model.base_model.model.model.layers[0]
    kept: list[int] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    for layer in (layers.self_attn.q_proj, layers.mlp.up_proj):  # with adapters and without
        x = torch.randn(3, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = layer(x)
        assert max(kept) == x.numel()
        y.sum().backward()
        assert x.grad.any()


def test_exporting_makes_one_layer_dense_at_a_time(tmp_path, directory, monkeypatch):
    model = adapted(directory)
    config = fit(model, steps=1)
    alive: list[weakref.ref] = []
    most = 0
    make_dense = bnb.dense

    def counted(layer: nn.Module, where: str = "") -> torch.Tensor:
        nonlocal most
        values = make_dense(layer, where)
        alive.append(weakref.ref(values))
        most = max(most, sum(ref() is not None for ref in alive))
        return values

    monkeypatch.setattr(bnb, "dense", counted)
    for format in ("compressed-tensors", "folded"):
        export(model, tmp_path / format, format=format, config=config)
    assert len(alive) >= 28
    assert most <= 3


# The Trainer


class Stop(TrainerCallback):
    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        control.should_save = control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_resumes_and_its_directory_comes_back(tmp_path, directory, reentrant):
    config = QuantConfig.parse("pege", "w4a16-g32")

    def trainer(name: str, **settings: object):
        model = adapted(directory, lora_dropout=0.1)
        settings |= {"activation_checkpointing": True, "save_strategy": "steps", "save_steps": 3}
        settings |= {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        return make(tmp_path / name, config, model=model, **settings)

    whole = trainer("whole")
    whole.train()
    assert sum(losses(whole)[-2:]) < sum(losses(whole)[:2])
    trainer("cut", callbacks=[Stop()]).train()
    rest = trainer("cut")
    rest.train(resume_from_checkpoint=True)
    assert losses(rest) == losses(whole)
    state = rest.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    if reentrant:
        return
    final = tmp_path / "final"
    whole.save_model(str(final))
    assert {STATE_FILE, CONFIG_FILE, "adapter_config.json"} <= {f.name for f in final.iterdir()}
    assert all("lora_" in key for key in load_file(final / "adapter_model.safetensors"))
    back = load_training_checkpoint(final, stored(directory))
    assert torch.equal(logits(back), logits(whole.model))
    named = load_training_checkpoint(final, quantization_config=BASES["nf4 double"])  # the base that PEFT wrote down
    assert torch.equal(logits(named), logits(whole.model))
    plain = PeftModel.from_pretrained(stored(directory), final)
    assert type(up_proj(plain)) is LoraLinear4bit
    whole.export(tmp_path / "out")
    assert verify(tmp_path / "out", back).max_abs_diff == 0.0


# Refusals, and models of other kinds


def test_refusals(directory):
    model = adapted(directory)
    with pytest.raises(AttachError, match=r"q_proj: expected a float base for LoftQ, got one that bitsandbytes has"):
        pack(model, loftq=1)
    layer = nn.Sequential(Linear4bit(64, 64))
    with pytest.raises(AttachError, match=r"0: expected weights that bitsandbytes has rounded, got Params4bit without"):
        attach(layer, QuantConfig.parse("ste", "w4a16-g32"))
    on_the_fly = nn.Sequential(Linear8bitLt(64, 64, has_fp16_weights=True))
    with pytest.raises(AttachError, match=r"0: expected weights that bitsandbytes has rounded, got Int8Params without"):
        attach(on_the_fly, QuantConfig.parse("ste", "w4a16-g32"))
    with pytest.raises(AttachError, match=r"q_proj: expected a method that rounds any weight it is given, got freeze"):
        attach(adapted(directory), QuantConfig.parse("freeze", "w4a16-g32"))


def test_a_module_that_is_not_transformers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Linear4bit(64, 64, quant_type="nf4"), nn.ReLU(), nn.Linear(64, 8)).to("cpu")
    model[0].to("cpu")
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    export(model, tmp_path / "out")
    report = verify(tmp_path / "out", model, inputs={"input": torch.randn(2, 64)})
    assert report.max_abs_diff == 0.0
    x = torch.randn(2, 64)
    want = model(x)
    assert torch.equal(detach(copy.deepcopy(model))(x), want)


def test_nobody_needs_bitsandbytes():
    code = "import sys; sys.modules['bitsandbytes'] = None; from tests.integration.test_packed import *; fit(adapted())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
