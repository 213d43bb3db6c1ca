"""Formats of scales: hand values, torch's own float8, and what a quantizer computes with them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from lightning_quant.estimators import build_estimator
from lightning_quant.estimators.ste import Ste
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scales import SCALE_FORMATS, e4m3, e4m3_divisor, e8m0, power_of_two
from lightning_quant.scheme import TensorSpec
from tests.loop import Run, check_folded, check_run

positive = st.floats(2.0**-100, 2.0**100, width=32)


# --- powers of two


@pytest.mark.parametrize(("scale", "want"), [(0.013, 0.015625), (0.03, 0.03125), (0.1, 0.125), (1.0, 1.0), (3.0, 4.0)])
def test_vector_power_of_two_is_rounded_up(scale, want):
    assert power_of_two(tensor([scale]), 7.0).item() == want


@given(positive)
def test_power_of_two_is_the_next_one(scale):
    got = power_of_two(tensor(scale), 1.0).item()
    assert math.log2(got) == round(math.log2(got))
    assert scale <= got < 2 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_exponents_are_exact_in_every_dtype(dtype):
    scale = tensor([2.0**e for e in range(-60, 61)], dtype=dtype)
    for rounder in (power_of_two, e8m0):
        assert torch.equal(rounder(scale, 1.0), scale)
        assert rounder(scale, 1.0).dtype == dtype


def test_zero_scales_stay_zero_and_grids_make_them_one():
    for name, rounder in SCALE_FORMATS.items():
        if rounder is not None:
            assert rounder(torch.zeros(3), 6.0).tolist() == [0, 0, 0]
            assert rounder(torch.empty(0), 6.0).shape == (0,)
        assert Grid(4, True, "e2m1", name).scale(torch.zeros(3)).tolist() == [1, 1, 1]


def test_a_zero_block_beside_others_is_harmless():
    """Its scale is 1 and its values stay 0."""
    for name in SCALE_FORMATS:
        scale = Grid(4, True, "e2m1", name).scale(tensor([0.0, 6.0]))
        assert scale.tolist() == [1, 1]


# --- microscaling's shared exponents


@given(positive, st.sampled_from(["e2m1", "e4m3", "e5m2"]))
def test_e8m0_is_the_exponent_of_the_largest_value_less_that_of_the_top_level(absmax, name):
    grid = Grid(4 if name == "e2m1" else 8, True, name, "e8m0")
    top = {"e2m1": 2, "e4m3": 8, "e5m2": 15}[name]
    assert grid.scale(tensor(absmax, dtype=torch.float64)).item() == 2.0 ** (math.floor(math.log2(absmax)) - top)
    assert not grid.covers


def on(grid, x):
    scale = grid.scale(x.abs().max())
    return (grid.round(x / scale, grid.table()) * scale).tolist()


def test_vector_mxfp4():
    """Scale 2^0: 5.2 is rounded to 6, -.7 to -.5; values up to twice the power of two are clipped."""
    grid = Grid(4, True, "e2m1", "e8m0")
    assert on(grid, tensor([0.1, -0.7, 2.3, 5.2])) == [0, -0.5, 2, 6]
    assert on(grid, tensor([7.9, 1.0])) == [6, 1]


def test_vector_nvfp4_with_a_float_scale():
    """Scale 5.2 / 6."""
    assert on(Grid(4, True, "e2m1"), tensor([0.1, -0.7, 2.3, 5.2])) == pytest.approx([0, -0.86666667, 2.6, 5.2])


# --- NVFP4's two levels of scales


def test_e4m3_scales_are_float8_times_one_number_per_tensor():
    absmax = torch.rand(64) * 5 + 1e-3
    scale = Grid(4, True, "e2m1", "e4m3").scale(absmax)
    divisor = 2.0 ** math.floor(math.log2(448 / float(absmax.max() / 6)))
    stored = (absmax / 6 * divisor).to(torch.float8_e4m3fn)
    assert 224 <= float(stored.float().max()) <= 448
    assert torch.equal(scale, stored.float() / divisor)
    assert ((scale / (absmax / 6) - 1).abs()[absmax > 0.1] <= 1 / 16 + 1e-6).all()


@given(st.lists(st.floats(2**-20, 2**20, width=32), min_size=1, max_size=9))
def test_e4m3_scales_can_be_stored_again(values):
    scale = e4m3(tensor(values), 6.0)
    assert torch.equal(e4m3(scale, 6.0), scale)
    divisor = e4m3_divisor(scale)
    assert torch.equal((scale * divisor).to(torch.float8_e4m3fn).float() / divisor, scale)


def test_e4m3_scales_far_below_the_largest_are_never_0():
    """A learned scale of 0 would divide by it."""
    assert e4m3(tensor([1.0, 1e-9, 0.0]), 6.0).tolist() == pytest.approx([1.0, 2**-9 / 256, 0.0])
    q, weight = group_quantizer("e4m3", learn=True, method="lsq"), torch.randn(4, 64)
    q.fit_range(weight)
    q.scale.data[0, 0] = 1e-6
    assert q(weight).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_e4m3_keeps_the_dtype(dtype):
    assert e4m3(tensor([1.0, 0.3], dtype=dtype), 6.0).dtype == dtype


# --- in a quantizer


def group_quantizer(scale_format, *, grid="e2m1", learn=False, dynamic=None, method="ste", shape=(4, 64)):
    rule = build_estimator(method)
    spec = TensorSpec(4, True, "group", 16, dynamic, None, learn, grid, scale_format=scale_format)
    spec = resolve_weight(spec, False, rule)
    return FakeQuantizer(spec, Granularity("group", 0, 16), rule, shape=shape)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("grid", ["e2m1", "int", "apot"])
def test_dynamic_weights_use_the_format(grid, scale_format):
    q, weight = group_quantizer(scale_format, grid=grid, dynamic=True), torch.randn(4, 64)
    y = q.eval()(weight)
    blocks = weight.reshape(-1, 16)
    scale = q.grid.scale(blocks.abs().amax(dim=1))
    u = blocks / scale[:, None]
    level = q.grid.round(u, q.table) if q.table is not None else u.round().clamp(q.low, q.high)
    assert torch.equal(y, (level * scale[:, None]).reshape(4, 64))
    assert torch.equal(y, q.on_grid(weight))


@pytest.mark.parametrize("scale_format", ["pow2", "e8m0", "e4m3"])
def test_learned_scales_are_rounded_with_the_identity_as_gradient(scale_format):
    q, weight = group_quantizer(scale_format, learn=True, method="lsq"), torch.randn(4, 64)
    q.fit_range(weight)
    q.scale.data.mul_(torch.linspace(1.03, 1.09, 16).reshape(4, 4))
    used = q.range.scale(q)
    torch.testing.assert_close(used.detach(), q.grid.format(q.scale.detach()), rtol=1e-6, atol=0)
    assert not torch.allclose(used, q.scale, rtol=1e-3)
    (gradient,) = torch.autograd.grad(used.sum(), q.scale)
    assert torch.equal(gradient, torch.ones_like(q.scale))
    exact = FakeQuantizer(replace(q.spec, scale_format="float"), q.granularity, q.estimator, shape=(4, 64))
    exact.scale.data.copy_(used.detach())
    exact.ready = True
    want = torch.autograd.grad(exact(weight).sum(), exact.scale)[0]
    torch.testing.assert_close(torch.autograd.grad(q(weight).sum(), q.scale)[0], want, rtol=1e-4, atol=1e-5)


def test_fixed_scales_are_stored_rounded():
    q, weight = group_quantizer("pow2"), torch.randn(4, 64)
    q = group_quantizer("pow2", dynamic=False)
    q.fit_range(weight)
    assert torch.equal(q.scale.log2(), q.scale.log2().round())
    assert q.range.scale(q) is q.scale


@pytest.mark.parametrize("scale_format", ["pow2", "e8m0"])
def test_dynamic_activation_blocks(scale_format):
    rule = Ste()
    spec = TensorSpec(4, True, "group", 16, True, grid="e2m1", scale_format=scale_format)
    spec = resolve_activation(spec, False, rule)
    q = FakeQuantizer(spec, Granularity("group", None, 16), rule, channels=32)
    x = torch.randn(3, 5, 32)
    y, blocks = q(x), x.reshape(-1, 16)
    scale = q.grid.scale(blocks.abs().amax(dim=1, keepdim=True))
    assert torch.equal(scale.log2(), scale.log2().round())
    assert torch.equal(y.reshape(-1, 16), q.grid.round(blocks / scale, q.table) * scale)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("scale_format", ["pow2", "e8m0", "e4m3"])
def test_training(scale_format, learn, tmp_path):
    run = check_run(lambda: Run("lsq", "w4a16-g8", scale_format=scale_format, learn_scale=learn), drop=0.8)
    q = run.model[0].weight_quant
    if scale_format != "e4m3":
        scale = q.stored(run.model[0].weight)[1].double().numpy()
        np.testing.assert_array_equal(np.log2(scale), np.round(np.log2(scale)))
    check_folded(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            TensorSpec(4, False, scale_format="pow2"),
            r"scale_format='pow2': expected a symmetric grid with range='scale'",
        ),
        (TensorSpec(4, scale_format="e8m0", range="log2"), r"scale_format='e8m0': expected .*range='log2'"),
        (TensorSpec(4, scale_format="e8mo"), r"Did you mean format 'e8m0'"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_weight(spec, False, Ste())
