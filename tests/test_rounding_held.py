"""Weights that stand for chosen codes: whatever the grid, evaluation reads those very codes off them."""

import copy

import pytest
import torch
from torch import nn

from lightning_quant import LayerRule, QuantConfig, TensorSpec, attach, detach
from lightning_quant.attach import quant_layers
from lightning_quant.rounding import round_model
from lightning_quant.rounding.held import Held

SCHEMES = (
    "w8a16", "w8a16-asym", "w8a16-tensor", "w8a16-g16", "w8a8", "w8a8-static", "w4a16-g16", "w4a16-g16-asym",
    "w3a16-tensor", "w2a16-channel", "w1.58a16-g16", "w1a16-channel", "nf4-g32", "fp8", "mxfp4", "nvfp4",
)  # fmt: skip


def made(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype)


def data(dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=draw) / 8
    return [(torch.randn(20, 64, generator=draw) @ mix).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rounding", ["rtn", "gptq", "adaround"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_ranges_are_read_back(scheme, rounding, dtype):
    """``write`` has compared all codes; a second rounding, and a fresh ``attach``, find the same ones."""
    model = made(dtype)
    attach(model, QuantConfig.parse("ste", scheme))
    nearest = {path: layer.weight_quant.stored(layer.weight) for path, layer in quant_layers(copy.deepcopy(model))}
    options = {"iterations": 60, "lr": 0.2} if rounding == "adaround" else {}
    round_model(model, None, data(dtype), rounding, **options)
    found = {path: layer.weight_quant.stored(layer.weight) for path, layer in quant_layers(model)}
    if rounding == "rtn":
        for path, (codes, scale, *_) in nearest.items():
            assert torch.equal(codes, found[path][0])
            assert torch.equal(scale, found[path][1])
    else:
        assert any(not torch.equal(codes, found[path][0]) for path, (codes, *_) in nearest.items())
    y = model(data(dtype)[0])
    round_model(model, None, data(dtype), "rtn")
    for path, layer in quant_layers(model):
        codes, scale, *_ = layer.weight_quant.stored(layer.weight)
        assert torch.equal(codes, found[path][0])
        assert torch.equal(scale, found[path][1])
    assert torch.equal(model(data(dtype)[0]), y)


def test_weights_are_what_evaluation_computes_with():
    model = made()
    round_model(model, QuantConfig.parse("ste", "w3a16-g16"), data(), "gptq")
    y = model(data()[0])
    weights = {path: layer.weight.clone() for path, layer in quant_layers(model)}
    detach(model, fold=False)
    assert torch.equal(model(data()[0]), y)
    assert torch.equal(model[0].weight, weights["0"])


def test_extremes_keep_a_range_that_follows_the_weight():
    model = made()
    attach(model, QuantConfig.parse("ste", "w8a16"))
    held = Held(model[0], "0")
    pushed = held.rows * 3 + 1
    codes = held.nearest(pushed)
    scale = model[0].weight_quant.stored(model[0].weight)[1]
    held.write(codes)
    stored, after, *_ = model[0].weight_quant.stored(model[0].weight)
    assert torch.equal(after, scale)
    assert torch.equal(stored.float(), codes)
    assert (held.pinned.sum(1) >= 1).all()


def test_a_range_that_follows_otherwise_is_refused():
    model = made()
    spec = TensorSpec(bits=4, dynamic=True, observer="absmean", granularity="channel")
    attach(model, QuantConfig(method="ste", weight=spec, activation=None))
    before = model[0].weight.clone()
    with pytest.raises(
        ValueError, match=r"0\.weight: expected codes that the rounded weight keeps, .* Set dynamic=False"
    ):
        round_model(model, None, data(), "gptq")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("method", ["stochastic", "clip_q"])
def test_methods_that_choose_codes_themselves_are_refused(method):
    model = made()
    attach(model, QuantConfig.parse(method, "w4a16-channel"))
    with pytest.raises(ValueError, match=r"0\.weight: expected .*, got method '.*', which .* method='ste'"):
        round_model(model, None, data())


def test_a_folded_normalization_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    attach(model, QuantConfig.parse("ste", "w4a16-channel", batch_norm="frozen"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight: expected a weight that is rounded as it is.*batch_norm"):
        round_model(model, None, [torch.randn(1, 3, 9, 9)])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_without_ranges_is_refused():
    model = made()
    attach(model, QuantConfig.parse("ste", "w4a16-channel"), fit=False)
    with pytest.raises(ValueError, match=r"0\.weight: expected a range, got none: attached with fit=False"):
        round_model(model, None, data())


def test_no_batches_and_no_config_are_refused():
    with pytest.raises(ValueError, match="round_model: expected at least one batch, got 0"):
        round_model(made(), QuantConfig.parse("ste", "w4a16-channel"), [])
    with pytest.raises(ValueError, match="round_model: expected a config, got a float model without one"):
        round_model(made(), None, data())


def test_rules_and_modes_are_kept():
    model = made().train()
    config = QuantConfig.parse("ste", "w4a16-channel", rules=[LayerRule(match="2", weight=None)])
    before = model[2].weight.clone()
    report = round_model(model, config, data(), "gptq")
    assert list(report.errors) == ["0"]
    assert model.training
    assert model[0].training
    assert torch.equal(model[2].weight, before)
    assert str(report).startswith("gptq: relative squared error")
