"""QLoRA with a base of our own: packed weights under real PEFT adapters, trained on another grid, exported exactly."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_quant import QuantConfig, QuantController, attach
from lightning_quant.attach import quant_layers
from lightning_quant.errors import AttachError
from lightning_quant.export import export, verify
from lightning_quant.packed import PackedLinear, pack
from tests.integration.test_lora import adapted, fit, logits
from tests.integration.tiny import causal_lm, token_batch

# PEFT 0.21 still asks transformers for the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def frozen(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))).requires_grad_(False)


@pytest.mark.parametrize(
    ("scheme", "bytes_per_weight", "error"),
    [("nf4-g64", 0.5, 0.1), ("w4-g32", 0.5, 0.07), ("w8", 1, 0.005), ("w3-g32", 0.5, 0.15), ("w8-tensor", 1, 0.005)],
)
def test_weights_take_few_bytes_and_come_back_on_their_grid(scheme, bytes_per_weight, error):
    net = frozen(64, 128, 64)
    before = [m.weight.clone() for m in net]
    saved = pack(net, scheme)
    assert not list(net[0].named_parameters())[1:]  # the bias alone
    for layer, weight in zip(net, before, strict=True):
        assert type(layer) is PackedLinear
        assert layer.weight_codes.numel() == bytes_per_weight * weight.numel()
        assert (layer.weight - weight).norm() < error * weight.norm()
    held = sum(t.numel() * t.element_size() for m in net for t in (m.weight_codes, m.weight_scale))
    assert saved == sum(4 * w.numel() for w in before) - held
    again = copy.deepcopy(net)
    x = torch.randn(2, 64)
    assert torch.equal(again(x), net(x))
    again.load_state_dict(net.state_dict())


def test_odd_rows():
    net = frozen(7, 3)
    weight = net[0].weight.clone()
    pack(net, "w4-channel")
    assert net[0].weight_codes.shape == (3, 4)
    assert (net[0].weight - weight).norm() < 0.1 * weight.norm()


@pytest.mark.parametrize("base", ["nf4-g64", "w4-g32", "w8"])
@pytest.mark.parametrize("case", ["plain", "dora", "dropout"])
def test_trained_merged_and_exported_logits_are_equal(tmp_path, case, base):
    model = adapted(case)
    pack(model, base)
    config = fit(model)
    lora = [layer for _, layer in quant_layers(model) if layer.folds]
    assert all(isinstance(layer, PackedLinear) for layer in lora)
    before = logits(model)
    codes = {p: layer.weight_quant.stored(layer.folded()[0])[0] for p, layer in quant_layers(model)}
    export(model, tmp_path / "packed", config=config)
    assert verify(tmp_path / "packed", model, token_batch()).max_abs_diff == 0.0
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), before)
    found = [layer.weight_quant.stored(layer.folded()[0])[0] for _, layer in quant_layers(merged)]
    assert all(torch.equal(a, b) for a, b in zip(codes.values(), found, strict=True))
    export(merged, tmp_path / "merged", config=config)
    assert verify(tmp_path / "merged", merged, token_batch()).ok


def test_shares_count_packed_weights():
    plain, packed = adapted(), adapted()
    pack(packed)
    want = attach(plain, QuantConfig.parse("ste", "w4a16-g32"))
    got = attach(packed, QuantConfig.parse("ste", "w4a16-g32"))
    assert [(e.path, e.share) for e in got.attached] == [(e.path, e.share) for e in want.attached]
    assert not got.unsupported


def test_loftq_is_nearer_to_the_float_model():
    def distance(rounds: int) -> float:
        torch.manual_seed(0)
        model = get_peft_model(causal_lm(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        want = logits(model)
        pack(model, "w2-g32", loftq=rounds)
        return float((logits(model) - want).norm() / want.norm())

    none, one, five = distance(0), distance(1), distance(5)
    assert five <= one * 1.02
    assert one < 0.9 * none


def test_nothing_of_the_weight_s_size_is_kept_for_backward():
    model = adapted()
    pack(model)
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    layer = dict(quant_layers(model))["base_model.model.model.layers.0.mlp.up_proj.base_layer"]
    kept: list[int] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer.folds[0].lora(x)
    assert max(kept) == x.numel()
    y.sum().backward()
    assert x.grad.any()


def test_between_forwards_nothing_is_made_dense(monkeypatch):
    model = adapted()
    pack(model)
    control = QuantController(QuantConfig.parse("lsq", "w4a16-g32"))
    control.prepare(model)
    control.begin(4)
    made: list[nn.Module] = []
    dense = PackedLinear.weight.fget
    monkeypatch.setattr(PackedLinear, "weight", property(lambda self: made.append(self) or dense(self)))
    control.on_step(0)
    model.train()(**token_batch()).logits.sum().backward()
    seen = len(made)
    assert seen
    control.before_optimizer_step()
    control.after_optimizer_step()
    assert len(made) == seen


def test_refusals():
    with pytest.raises(AttachError, match=r"pack: expected frozen Linear layers, got none\. Wrap the model"):
        pack(nn.Sequential(nn.Linear(4, 4)))
    net = frozen(64, 48, 8)
    with pytest.raises(AttachError, match="group_size=64 does not divide in_features=48"):
        pack(net, "nf4-g64")
    assert type(net[0]) is nn.Linear
    with pytest.raises(ValueError, match="expected a grid around 0"):
        pack(net, "w4-asym-g8")
    model = adapted()
    with pytest.raises(AttachError, match=r"q_proj: expected a method that rounds any weight it is given, got freeze"):
        attach(model, QuantConfig.parse("freeze", "w4a16-g32"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AttachError, match="one adapter per layer"):
        pack(model, loftq=1)
