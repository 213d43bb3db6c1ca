"""Feature quantization: rounding inputs down, and behind a power."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from lightning_quant.estimators.floor import Floor
from lightning_quant.estimators.power import Power, SignedPower
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation
from lightning_quant.scheme import TensorSpec
from tests.loop import Run, check_folded, check_run, convolutional, weights_lie_on_their_grid


def of_inputs(rule, bits=4, scale=0.25, dynamic=False, symmetric=True):
    kind = "token" if dynamic else "tensor"
    spec = resolve_activation(TensorSpec(bits, symmetric, kind, None, dynamic), False, rule)
    q = FakeQuantizer(spec, Granularity(spec.granularity, None), rule, channels=3, dtype=torch.float64)
    if not dynamic:
        q.set_range(tensor([0.0]), tensor([q.high * scale]))
    return q


def run(q, x, g=1.0):
    x = tensor(x, dtype=torch.float64, requires_grad=True)
    y = q(x)
    y.backward(torch.full_like(y, g))
    return y.tolist(), x.grad.tolist()


def test_vector_floor():
    """beta = 4; the last code is reached up to one step above it, and everything else is cut."""
    y, gx = run(of_inputs(Floor()), [0.3, -0.3, 1.49, 1.76, 1.99, 2.01, -2.0, -2.01])
    assert y == [0.25, -0.5, 1.25, 1.75, 1.75, 1.75, -2.0, -2.0]
    assert gx == [1, 1, 1, 1, 1, 0, 1, 0]


def test_floor_rounds_down_around_any_zero_point():
    q = of_inputs(Floor(), bits=8, symmetric=False)
    q.set_range(tensor([-1.0]), tensor([2.0]))
    x = torch.linspace(-1, 2, 301, dtype=torch.float64)
    s = q.scale.item()
    assert s == pytest.approx(3 / 255)
    steps = (q(x) / s).round()
    assert ((x / s - steps) > -1e-9).all()
    assert ((x / s - steps)[x < 1.99] < 1 + 1e-9).all()


def test_vector_power():
    """a = .5: 1.49 -> 1.2207, .3 -> .5477; on a step of .25 they are 1.25 and .5."""
    y, gx = run(of_inputs(Power()), [0.3, -0.3, 1.49])
    assert y == [0.5, -0.5, 1.25]
    assert gx == pytest.approx([0.9129, 0.9129, 0.4096], abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_power_and_its_slope_are_finite_at_zero(dtype):
    x = tensor([0.0, -0.0, 1e-30, -4.0], dtype=dtype, requires_grad=True)
    y = SignedPower.apply(x, 0.5, 0.0625)
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert y[[0, 1, 3]].tolist() == [0, 0, -2]
    assert x.grad.tolist() == [2, 2, 2, 0.25]


def test_power_is_differentiated_right():
    x = torch.randn(20, dtype=torch.float64).mul_(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SignedPower.apply(x, 0.7, 1e-6), x)


def test_dynamic_ranges_are_those_behind_the_power():
    y, _ = run(of_inputs(Power(), bits=3, dynamic=True), [[9.0, 1.0, -4.0], [0.04, 0.0, -0.0144]])
    want = torch.tensor([[3.0, 1.0, -2.0], [0.2, 0.0, -0.4 / 3]], dtype=torch.float64)
    torch.testing.assert_close(tensor(y, dtype=torch.float64), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4-g8-static"])
@pytest.mark.parametrize("method", ["floor", "power"])
def test_training(method, scheme):
    check_run(lambda: Run(method, scheme, lr=0.02), drop=0.8)


@pytest.mark.parametrize("method", ["floor", "power"])
def test_convolutions_and_export(method, tmp_path):
    run = Run(method, "w8a8", convolutional(), total=16).steps(0, 16)
    assert run.losses[-1] < run.losses[0]
    weights_lie_on_their_grid(run.model)
    check_folded(Run(method, "w4a16-g8", total=4).steps(0, 4), tmp_path / "out")


@pytest.mark.parametrize("settings", [{"exponent": 0.0}, {"exponent": 1.5}, {"eps": 0.0}])
def test_refusals(settings):
    with pytest.raises(ValueError, match=r"power: expected exponent in \(0, 1\] and eps > 0"):
        Power(**settings)


def test_floor_needs_even_levels():
    with pytest.raises(ValueError, match="input: method floor: expected a uniform grid"):
        Run("floor", "fp8-static")
    with pytest.raises(ValueError, match="input: method 'floor': expected dynamic=False, got dynamic=True"):
        Run("floor", "w8a8-token")
