"""LoRA whose merge is exact, with real PEFT models: what training rounds is what merging stores and export ships."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_quant import LayerRule, QuantConfig, QuantController, attach, calibrate, detach
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import AttachError
from lightning_quant.export import export, verify
from lightning_quant.optim import param_groups
from lightning_quant.quantizer import FakeQuantizer
from tests.integration.tiny import causal_lm, token_batch

# PEFT 0.21 still asks transformers for the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
    "dropout": {"lora_dropout": 0.25},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.25},
}


COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports


def adapted(case: str = "plain", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, **{**CASES[case], **settings})
    model = get_peft_model(causal_lm(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


def fit(model: nn.Module, method: str = "lsq", scheme: str = "w4a16-g32", steps: int = 6) -> QuantConfig:
    config = QuantConfig.parse(method, scheme)
    control = QuantController(config)
    control.prepare(model)
    optimizer = torch.optim.AdamW(param_groups(model, config, lr=1e-2))
    control.begin(steps)
    model.train()
    losses = []
    for step in range(steps):
        control.on_step(step)
        batch = token_batch(4, seed=step)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        control.before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        control.after_optimizer_step()
        losses.append(float(loss.detach()))
    control.on_eval()
    return config


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8", "w2a16-g32"])
@pytest.mark.parametrize("case", CASES)
def test_fake_quant_merged_and_exported_logits_are_equal(tmp_path, case, scheme):
    model = adapted(case)
    config = fit(model, scheme=scheme)
    config = QuantConfig.from_dict({**config.to_dict(), "target": "transformers"})
    for _, q in quantizers(model):
        q.target = "transformers"
    before = logits(model)
    codes = {p: layer.weight_quant.stored(layer.folded()[0])[0] for p, layer in quant_layers(model)}
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), before)
    found = {p: layer.weight_quant.stored(layer.weight)[0] for p, layer in quant_layers(merged)}
    assert len(found) == len(codes) == 14
    for (path, code), other in zip(codes.items(), found.values(), strict=True):
        assert torch.equal(code, other), path
    export(merged, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", merged, token_batch())
    assert report.ok
    assert report.max_abs_diff == 0.0


def test_peers_way_is_another_function():
    """Q(W) x + s B A x in training, Q(W + s B A) x shipped."""
    model = adapted()
    fit(model)
    want = logits(model)
    plain = copy.deepcopy(model)
    for _, layer in quant_layers(plain):
        if layer.folds:
            lora = layer.folds[0].lora
            lora._disable_adapters = True  # the base alone is rounded ...

            def outside(module, args, y, lora=lora):
                x = args[0]
                names = lora.lora_A.keys()
                return y + sum(lora.lora_B[n](lora.lora_A[n](x)) * lora.scaling[n] for n in names)  # ... and B A added

            lora.register_forward_hook(outside)
    assert (logits(plain) - want).abs().max() > 1e-3


def test_gradients_are_those_of_the_written_formula():
    model = adapted("plain").double()
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    layer = dict(quant_layers(model))["base_model.model.model.layers.0.self_attn.q_proj.base_layer"]
    lora = layer.folds[0].lora
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    x = torch.randn(3, 64, dtype=torch.float64)
    g = torch.randn(3, 64, dtype=torch.float64)
    lora(x).backward(g)
    got = a.grad.clone(), b.grad.clone()
    w = (layer.weight + (b @ a) * 4.0).detach().requires_grad_()
    (torch.nn.functional.linear(x, layer.weight_quant(w)) * g).sum().backward()
    torch.testing.assert_close(got[0], 4.0 * b.T @ w.grad)
    torch.testing.assert_close(got[1], 4.0 * w.grad @ a.T)
    assert layer.weight.grad is None


@pytest.mark.parametrize(("method", "scheme"), [("ste", "w8a8"), ("lsq", "w8a8-static"), ("ewgs", "w4a8-static-g32")])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILES)])
def test_an_input_is_rounded_once(monkeypatch, method, scheme, compiled):
    """With its gradient, and its scale's, as those of a plain layer that holds the merged weight."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    config = QuantConfig.parse(method, scheme, compile=compiled, calibration=1, head=True)
    attach(model, config)
    x = 3 * torch.randn(8, 64)
    calibrate(model, [x / 2])  # so that some of it is clipped
    twin = copy.deepcopy(model).merge_and_unload().train()
    calls: list[FakeQuantizer] = []

    def noting(born):
        return lambda q, value: (calls.append(q), born(q, value))[1]

    monkeypatch.setattr(FakeQuantizer, "_quantize", noting(FakeQuantizer._quantize))
    monkeypatch.setattr(FakeQuantizer, "deferred", noting(FakeQuantizer.deferred))
    results = []
    for one in (model.train(), twin):
        calls.clear()
        given = x.clone().requires_grad_()
        y = one(given)
        inputs = [q for q in calls if not q.is_weight]
        assert len(inputs) == 2
        y.square().sum().backward()
        learned = [layer.input_quant.scale.grad for _, layer in quant_layers(one) if not layer.input_quant.spec.dynamic]
        results.append([y, given.grad, *(g for g in learned if g is not None)])
    assert len(results[0]) == len(results[1]) == (2 if scheme == "w8a8" else 4)
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_adapters():
    model = adapted()
    model.add_adapter(
        "other", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    model.set_adapter("default")
    default = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert len({float(t.sum()) for t in (default, other, both)}) == 3
    assert torch.equal(logits(copy.deepcopy(model).merge_and_unload()), both)
    with model.disable_adapter():
        base = logits(model)
    fresh = causal_lm()
    attach(fresh, QuantConfig.parse("ste", "w4a16-g32"))
    assert base.shape == logits(fresh).shape
    model.merge_adapter()
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), both, atol=0.2, rtol=0.1)  # subtraction rounds; a code may flip


def test_only_adapters_and_scales_train_and_scales_move():
    model = adapted()
    fit(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n or n.endswith("weight_quant.scale") for n in trained)
    assert sum(n.endswith("weight_quant.scale") for n in trained) == 12  # gate_proj has no adapter: it stays


def test_saved_modules_and_rules_by_the_float_model_s_paths():
    model = get_peft_model(causal_lm(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    rules = [LayerRule("model.layers.1.self_attn.q_proj", weight=None), LayerRule("lm_head", weight="w8")]
    report = attach(model, QuantConfig.parse("ste", "w4a16-g32", rules=rules))
    paths = {e.path for e in report.attached}
    assert "base_model.model.lm_head.modules_to_save.default" in paths
    assert not any("original_module" in p or "lora_" in p for p in paths)
    assert [e.path for e in report.excluded if e.what == "by a rule"] == [
        "base_model.model.model.layers.1.self_attn.q_proj.base_layer"
    ]
    assert not report.unsupported
    logits(model)


def test_attach_undone_is_peft_again():
    model = adapted()
    before, keys = logits(model), set(model.state_dict())
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    assert not torch.equal(logits(model), before)
    detach(model, fold=False)
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == keys


def test_bfloat16_base_under_autocast_merges_exactly():
    model = adapted()
    model.base_model.model.to(torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
    merged = model.merge_and_unload()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(merged), before)


def test_merged_adapters_are_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(
        AttachError, match=r"q_proj: expected adapters beside the base weight, got \['default'\] merged"
    ):
        attach(model, QuantConfig.parse("ste", "w4a16-g32"))


def test_folding_beside_an_adapter_is_refused():
    model = adapted()
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    with pytest.raises(AttachError, match=r"expected adapters merged first.*merge_and_unload"):
        detach(model)
