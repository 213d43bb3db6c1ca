"""HWGQ: published levels, thresholds, the three slopes, measured variance, training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.attach import attach
from lightning_quant.estimators.binary import Binary
from lightning_quant.estimators.hwgq import Hwgq
from lightning_quant.estimators.ste import Ste
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig
from tests.loop import Run, check_folded, check_run, convolutional
from tests.oracle import hwgq as paper


def input_quantizer(bits=2, dtype=torch.float64, **options):
    rule = Hwgq(**{"spread": "unit", **options}).role(False)
    spec = resolve_activation(TensorSpec(bits), False, rule)
    q = FakeQuantizer(spec, Granularity("tensor", None), rule, channels=4, dtype=dtype)
    if q.observer.data_free:
        q.fit_range(torch.empty(1, 0))
    return q


def gradient(q, x):
    x = tensor(x, dtype=torch.float64, requires_grad=True)
    q(x).sum().backward()
    return x.grad.tolist()


def test_published_levels():
    """The authors' 2-bit networks have the levels .538, 1.076 and 1.614."""
    levels = input_quantizer()(torch.linspace(-3, 3, 601, dtype=torch.float64)).unique()
    assert levels.tolist() == pytest.approx([0, 0.538, 1.076, 1.614], abs=3e-3)


def test_no_positive_input_becomes_0():
    """Thresholds 0, 1.5 q, 2.5 q: nearest-level rounding would have one at q/2."""
    q = input_quantizer()
    step = q.upper.item() / 3
    x = tensor([-1.0, 0.0, 1e-3, 0.49 * step, 1.49 * step, 1.51 * step, 2.49 * step, 2.51 * step, 99.0])
    assert (q(x.double()) / step).tolist() == pytest.approx([0, 0, 1, 1, 1, 2, 2, 3, 3])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_levels_of_other_widths(bits):
    q = input_quantizer(bits)
    x = torch.randn(2000, dtype=torch.float64) * 2
    n = 2**bits - 1
    np.testing.assert_allclose(q(x).numpy(), paper.quantize(x.numpy(), q.upper.item() / n, n), rtol=1e-12, atol=1e-12)


def test_error_is_that_of_the_best_step():
    """Expected squared errors of the half normal around the step found."""
    step = input_quantizer().upper.item() / 3
    errors = [paper.error(step * f, 3) for f in (0.97, 1.0, 1.03)]
    assert errors[1] < min(errors[0], errors[2])


# --- slopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backward", "above"), [("clipped", 0.0), ("vanilla", 1.0)])
def test_slopes(backward, above):
    q = input_quantizer(backward=backward)
    top = q.upper.item()
    assert gradient(q, [-0.5, 0.0, 1e-3, 0.9, top * (1 - 1e-9), top + 0.1, 50.0]) == [0, 0, 1, 1, 1, above, above]


def test_log_tail():
    """1 / (x - tau) with tau = q_m - 1 is 1 at q_m and 1/2 one sigma above it."""
    q = input_quantizer(backward="log")
    top = q.upper.item()
    assert gradient(q, [-0.5, 0.0, 1e-3, top, top + 1, top + 3]) == pytest.approx([0, 0, 1, 1, 1 / 2, 1 / 4], rel=1e-6)
    q.set_range(tensor([0.0]), tensor([10 * top]))  # sigma = 10
    assert gradient(q, [10 * top, 10 * (top + 1)]) == pytest.approx([1, 1 / 2], rel=1e-6)


def test_slopes_of_infinite_inputs():
    for backward in ("clipped", "vanilla", "log"):
        grads = gradient(input_quantizer(backward=backward), [-math.inf, math.inf])
        assert grads[0] == 0
        assert math.isfinite(grads[1])


# --- variance ---------------------------------------------------------------------------------------------------------


def test_measured_range_follows_the_rms_of_positive_inputs():
    q = input_quantizer(spread="measured")
    assert not q.ready
    for sigma in (1.0, 2.0):
        q.observe(tensor([[3.0, 4.0, -9.0, 0.0]], dtype=torch.float64) * sigma)
        q.commit()
    rms = math.sqrt(12.5)
    assert q.upper.item() == pytest.approx(3 * 0.53881192 * (0.9 * rms + 0.1 * 2 * rms))


def test_unit_range_needs_no_data_and_is_not_observed():
    run = Run("hwgq", "w4a2", model=convolutional(), spread="unit", calibration=4).steps(0, 3)
    for layer in run.model:
        if hasattr(layer, "input_quant"):
            assert layer.input_quant.upper.item() == pytest.approx(3 * 0.53881192)


# --- weights, refusals, training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "other"), [(1, Binary()), (4, Ste()), (1.58, Ste())])
def test_weights_are_those_of_binary_or_ste(bits, other):
    w = torch.randn(4, 16, dtype=torch.float64) * 2
    results = []
    for rule in (Hwgq().role(True), other.role(True)):
        spec = resolve_weight(TensorSpec(bits), True, rule)
        q = FakeQuantizer(spec, Granularity(spec.granularity), rule, shape=w.shape, dtype=w.dtype)
        q.fit_range(w)
        at = w.clone().requires_grad_()
        y = q(at)
        y.square().sum().backward()
        results.append((spec, y.detach(), at.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w1a2", {"backward": "cliped"}, "hwgq.backward: .*Did you mean backward 'clipped'"),
        ("w1a2", {"spread": "units"}, "hwgq.spread: .*Did you mean spread 'unit'"),
        ("w4a2-token", {}, "0.input: method 'hwgq': expected granularity='tensor', got granularity='token'"),
    ],
)
def test_refusals(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), QuantConfig.parse("hwgq", scheme, **options))


@pytest.mark.parametrize(
    ("scheme", "model", "options"),
    [
        ("w1a2", convolutional, {}),
        ("w4a2", convolutional, {"backward": "vanilla"}),
        ("w4a4-channel", None, {"backward": "log"}),
        ("w8a1", None, {"spread": "unit"}),
        ("w1", None, {}),
        ("w4-channel", None, {}),
    ],
)
def test_training(tmp_path, scheme, model, options):
    run = check_run(lambda: Run("hwgq", scheme, model and model(), calibration=4, **options), drop=0.95)
    if "a" not in scheme:
        check_folded(run, tmp_path / "out")
