"""Ternary weight networks: published values, the scale as a least-squares solution, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.attach import attach
from lightning_quant.estimators.ste import Ste
from lightning_quant.estimators.twn import Twn
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_weight
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig
from tests.loop import Run, check_folded, check_run, convolutional
from tests.oracle import twn as paper


def quantizer(shape=(1, 6), kind="channel", dtype=torch.float64):
    rule = Twn().role(True)
    size = 4 if kind == "group" else None
    spec = resolve_weight(TensorSpec(1.58, True, kind, size), False, rule)
    return FakeQuantizer(spec, Granularity(spec.granularity, 0, size or 0), rule, shape=shape, dtype=dtype)


def test_published_values():
    """Delta = .2065, alpha = .53333333."""
    w = tensor([[0.5, -0.1, 0.3, -0.8, 0.05, 0.02]], dtype=torch.float64, requires_grad=True)
    y = quantizer()(w)
    y.sum().backward()
    a = 0.53333333
    assert y[0].tolist() == pytest.approx([a, 0, a, -a, 0, 0])
    assert w.grad[0].tolist() == [1] * 6


@pytest.mark.parametrize(("near", "code"), [(0.2064, 0), (0.2066, 1), (-0.2066, -1)])
def test_threshold(near, code):
    """A weight just below or above 0.7 E|w|, beside one that keeps E|w| at .295."""
    w = [0.5, -0.1, 0.3, -0.8, 0.05, 0.02, near]
    w.append(8 * 0.295 - sum(map(abs, w)))
    codes = quantizer((1, 8)).stored(tensor([w], dtype=torch.float64))[0]
    assert codes[0].tolist() == [1, 0, 1, -1, 0, 0, code, 1]


@pytest.mark.parametrize("kind", ["channel", "tensor", "group"])
def test_alpha_is_the_least_squares_scale_of_its_codes(kind):
    w = torch.randn(3, 8, dtype=torch.float64)
    q = quantizer((3, 8), kind)
    codes, scale, _, _ = q.stored(w)
    blocks = zip(q.granularity.flat(w), q.granularity.flat(codes.double()), scale.flatten(), strict=True)
    for row, code, alpha in blocks:
        best = np.linalg.lstsq(code.numpy().reshape(-1, 1), row.numpy(), rcond=None)[0]
        assert alpha.item() == pytest.approx(best.item())
        want, want_codes = paper.ternary(row.numpy())
        assert alpha.item() == pytest.approx(want)
        assert code.tolist() == want_codes.tolist()


def test_everything_follows_the_weight():
    q = quantizer((2, 64))
    w = torch.randn(2, 64, dtype=torch.float64)
    torch.testing.assert_close(q(5 * w), 5 * q(w))
    assert not q.state_dict()


def test_a_row_of_zeros():
    w = torch.zeros(1, 6, requires_grad=True)
    y = quantizer(dtype=torch.float32)(w)
    y.sum().backward()
    assert y.tolist() == [[0] * 6]
    assert w.grad.tolist() == [[1] * 6]


def test_share_of_zeros_of_normal_weights():
    """P(|w| < 0.7 sqrt(2/pi)) = 0.4235."""
    w = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(1))
    share = (quantizer((1, 100_000), dtype=torch.float32)(w) == 0).double().mean().item()
    assert share == pytest.approx(0.4235, abs=0.01)


def test_inputs_are_those_of_ste():
    assert Twn().role(False) == Ste()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w2", "0.weight: method 'twn': expected bits=1.58, got bits=2"),
        ("w1.58-asym", "expected symmetric=True"),
    ],
)
def test_refusals(scheme, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), QuantConfig.parse("twn", scheme))


def test_the_paper_s_single_scale_is_a_scheme_away():
    model = nn.Sequential(nn.Linear(8, 4))
    attach(model, QuantConfig.parse("twn", "w1.58-tensor"))
    assert model[0].weight_quant.on_grid(model[0].weight).abs().unique().numel() == 2


@pytest.mark.parametrize(
    ("scheme", "model"), [("w1.58", None), ("w1.58-tensor", convolutional), ("w1.58-g4", None), ("w1.58a8", None)]
)
def test_training(tmp_path, scheme, model):
    run = check_run(lambda: Run("twn", scheme, model and model()), drop=0.95)
    if "a" not in scheme:
        check_folded(run, tmp_path / "out")
