"""Keys and values on their grid: in training, in the cache while generating, in what is exported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from lightning_quant import QuantConfig, attach, detach
from lightning_quant.attach import quantizers
from lightning_quant.checkpoint import load_training_checkpoint
from lightning_quant.errors import AttachError, CheckpointError
from lightning_quant.export import export, verify
from lightning_quant.kv_cache import kv_quantizers
from tests.integration.test_export import damaged, train_a_little
from tests.integration.tiny import causal_lm, token_batch


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("scheme", ["w4a16-g32-kv8", "w8a8-static-kvfp8", "w8a16-kvfp8"])
def test_the_reader_computes_what_training_computed(tmp_path, family, scheme):
    config = QuantConfig.parse("pege", scheme, target="transformers", calibration=2)
    model = train_a_little(causal_lm(family), config)
    assert len(kv_quantizers(model)) == 2
    export(model, tmp_path / "out", config=config)
    data = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert data["kv_cache_scheme"]["type"] == ("float" if "fp8" in scheme else "int")
    assert "dequantize" not in data
    report = verify(tmp_path / "out", model)
    assert (report.ok, report.max_abs_diff, report.notes) == (True, 0.0, [])
    float_cache = train_a_little(causal_lm(family), config)
    for quant in kv_quantizers(float_cache).values():
        quant.k.enabled = quant.v.enabled = False
    assert not torch.equal(float_cache(**token_batch()).logits, model(**token_batch()).logits)


def test_generation_with_the_cache_equals_the_readers_and_that_without_one(tmp_path):
    config = QuantConfig.parse("ste", "w8a16-kv8", target="transformers", calibration=2)
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = token_batch(rows=1)["input_ids"][:, :6]
    ours = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert torch.equal(ours, reader.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False))
    plain = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, use_cache=False)
    assert torch.equal(ours, plain)


def test_ranges_are_calibrated_saved_and_resumed(tmp_path):
    config = QuantConfig.parse("ste", "w8a16-kv8", calibration=2)
    model = train_a_little(causal_lm(), config)
    names = {p for p, q in quantizers(model) if ".kv_quant." in p}
    assert len(names) == 4
    from hf_integration import QuantTrainer

    trainer = QuantTrainer(model=causal_lm(), quant=config)
    trainer.save_model(tmp_path / "run")
    state = load_file(tmp_path / "run" / "quant_state.safetensors")
    assert {f"{n}.scale" for n in names} <= set(state)
    assert isinstance(load_training_checkpoint(tmp_path / "run"), nn.Module)


def test_gradient_checkpointing_changes_nothing():
    config = QuantConfig.parse("ste", "w8a16-kv8")
    grads = []
    for again in (False, True):
        model = causal_lm()
        attach(model, config)
        if again:
            model.activation_checkpointing_enable()
        model.train()
        batch = token_batch()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(*grads)


def test_detach_leaves_nothing():
    model = causal_lm()
    before, keys = model(**token_batch()).logits, set(model.state_dict())
    attach(model, QuantConfig.parse("ste", "w8a16-kv8"))
    detach(model, fold=False)
    assert set(model.state_dict()) == keys
    assert torch.equal(model(**token_batch()).logits, before)
    assert not model.model.layers[0].self_attn._forward_pre_hooks


def test_a_wrong_scale_is_found(tmp_path):
    config = QuantConfig.parse("ste", "w8a16-kv8", calibration=2)
    model = train_a_little(causal_lm(), config)
    export(model, tmp_path / "out", config=config)
    bad = damaged(tmp_path, lambda t: t["model.layers.1.self_attn.v_scale"].mul_(1.01))
    report = verify(bad, model)
    assert "model.layers.1.self_attn.v_scale" in report.other
    bad2 = tmp_path / "again"
    bad2.mkdir()
    with pytest.raises(CheckpointError):
        verify(bad2, model)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"kv_cache: expected one of fp8, int8, got 'int4'"):
        QuantConfig(kv_cache="int4")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(AttachError, match="attention of a decoder of transformers, got an encoder-decoder"):
        attach(t5, QuantConfig.parse("ste", "w8a16-kv8"))
    with pytest.raises(AttachError, match="attention of a decoder of transformers, got none"):
        attach(nn.Sequential(nn.Linear(8, 8)), QuantConfig.parse("ste", "w8a16-kv8"))
    model = causal_lm()
    attach(model, QuantConfig.parse("ste", "w8a16-kv8"))
    with pytest.raises(ValueError, match="expected calibrated keys and values"):
        export(model, tmp_path / "out")
    model = train_a_little(causal_lm(), QuantConfig.parse("ste", "w8a16-kv8"))
    with pytest.raises(ValueError, match="expected keys and values in fp8, got int8"):
        export(model, tmp_path / "out", target="vllm")
    model = train_a_little(causal_lm(), QuantConfig.parse("ste", "w4a16-g32-asym-kv8"))
    with pytest.raises(ValueError, match="weights that are read packed beside a quantized cache"):
        export(model, tmp_path / "out")
