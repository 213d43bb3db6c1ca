"""Mistakes found in the wild: each test writes the wrong version down and shows that ours is the right one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import tensor

from lightning_quant.estimators import ESTIMATORS, build_estimator
from lightning_quant.estimators.ewgs import Ewgs
from tests.test_estimators import fact, quantizer_of, run

LOW, HIGH = -8, 7  # codes of 4 bits
MASKED = ("ste", "lsq", "ewgs", "dsq", "pege", "pege_replace", "bireal", "dampen", "freeze", "stochastic", "noise")


def passes(q, x):
    """Where a gradient of 1 comes back."""
    x = x.clone().requires_grad_()
    q(x).sum().backward()
    return (x.grad != 0).double().numpy()


@pytest.mark.parametrize("scale", [0.25, 4.0])
@pytest.mark.parametrize("zero", [0.0, 3.0])
@pytest.mark.parametrize("method", MASKED)
def test_masks_compare_codes_with_codes(method, zero, scale):
    """Wrong: whether the real x, not x / s + z, lies between the lowest and the highest code; or z's sign swapped."""
    rule = build_estimator(method, dict(fact(method, "OPTIONS", {})))
    q, _ = quantizer_of(rule, "tensor", torch.float64, bits=4, symmetric=zero == 0, learn=False, shape=(1, 6))
    q.scale.fill_(scale)
    if zero:
        q.zero.fill_(zero)
    x = np.array([-45.3, -9.1, -2.6, 2.4, 9.3, 35.9])
    u = x / scale + zero
    right = (u >= LOW) & (u <= HIGH)
    wrong = [(x >= LOW) & (x <= HIGH)]
    if zero:
        swapped = x / scale - zero
        wrong.append((swapped >= LOW) & (swapped <= HIGH))
    ours = passes(q, tensor(x).reshape(1, -1))[0].astype(bool)
    for mask in wrong:
        assert (mask != right).any()
        assert (ours[mask != right] == right[mask != right]).all()
    assert (ours == right).all()


def test_masks_on_real_numbers_agree_at_scale_1():
    """Why nobody notices: for s = 1 and z = 0 the wrong mask is the right one."""
    x = np.array([-9.1, -2.6, 2.4, 9.3])
    _, gx, _, _ = run(build_estimator("ste"), x.tolist(), [1.0], 4, [1.0] * 4)
    assert gx == ((x >= LOW) & (x <= HIGH)).astype(float).tolist()


@pytest.mark.parametrize("method", ["ste", "lsq", "ewgs"])
def test_masks_per_channel_use_each_channels_scale(method):
    """Wrong: one scale for all rows."""
    q, _ = quantizer_of(build_estimator(method), "channel", torch.float64, learn=False, shape=(2, 3))
    q.scale.copy_(tensor([[0.25], [4.0]]))
    x = tensor([[-3.1, 1.3, 3.1], [-3.1, 9.3, 31.3]], dtype=torch.float64)
    assert passes(q, x).tolist() == [[0, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize("delta", [1e-3, 0.25])
def test_ewgs_scales_by_the_sign_of_the_gradient(delta):
    """Wrong: g (1 + delta (x_n - x_q)), or with |x_n - x_q|; for g > 0 the first agrees, for g < 0 it is mirrored."""
    x = np.array([-0.9, -0.6, 0.3, 0.5, 0.8, 0.95])
    g = np.array([-0.5, 0.5, -0.5, -2.0, 0.25, -1.0])
    share = np.clip((x + 1) / 2, 0, 1)
    error = share - np.round(3 * share) / 3
    right = g * (1 + delta * np.sign(g) * error) * 1.0
    without_sign = g * (1 + delta * error)
    with_size = g * (1 + delta * np.abs(error))
    _, gx, _, _ = run(Ewgs(delta=delta), x.tolist(), [2 / 3], 2, g.tolist(), zero=-0.5)
    np.testing.assert_allclose(gx, right, rtol=1e-12)
    differ = g < 0
    assert (np.abs(without_sign - right)[differ] > 1e-2 * delta * np.abs(g[differ])).all()
    np.testing.assert_allclose(without_sign[~differ], right[~differ], rtol=1e-12)
    assert (np.abs(with_size - right) > 1e-2 * delta * np.abs(g))[g * error < 0].any()
    assert not np.allclose(gx, without_sign, rtol=0, atol=1e-2 * delta)
    assert not np.allclose(gx, with_size, rtol=0, atol=1e-2 * delta)


def test_every_masked_method_is_a_method():
    assert set(MASKED) <= set(ESTIMATORS)
