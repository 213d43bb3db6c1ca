"""Codes, levels, scales: hand values, then laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from lightning_quant.grid import (
    affine_scale,
    code_bounds,
    decode,
    encode,
    fixed_zero,
    reader_scale,
    scale_and_zero,
    symmetric_scale,
)
from lightning_quant.scheme import WEIGHT_BITS
from tests import oracle

values = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20)
widths = st.sampled_from(WEIGHT_BITS)
scales = st.floats(2**-8, 8, width=32)


def test_code_bounds():
    assert [code_bounds(b) for b in (1, 1.58, 2, 3, 4, 8)] == [
        (-1, 0),
        (-1, 1),
        (-2, 1),
        (-4, 3),
        (-8, 7),
        (-128, 127),
    ]


def test_ties_go_to_even():
    x = tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert encode(x, tensor(1.0), 0.0, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]


def test_two_bit_hand_values():
    x = tensor([-1.2, -0.35, -0.1, 0.12, 0.26, 0.9])
    code = encode(x, tensor(0.25), 0.0, -2, 1)
    assert decode(code, tensor(0.25), 0.0).tolist() == [-0.5, -0.25, 0, 0, 0.25, 0.25]


def test_one_bit_has_two_levels_and_zero_is_positive():
    x = tensor([-1.5, -0.3, 0.0, 0.8])
    scale = symmetric_scale(x.abs().max(), 1)
    y = decode(encode(x, scale, fixed_zero(1), -1, 0), scale, fixed_zero(1))
    assert y.tolist() == [-1.5, -1.5, 1.5, 1.5]


def test_ternary_has_three_levels():
    x = tensor([-2.0, -0.6, 0.3, 1.2, 2.0])
    scale = symmetric_scale(x.abs().max(), 1.58)
    assert decode(encode(x, scale, 0.0, -1, 1), scale, 0.0).tolist() == [-2, 0, 0, 2, 2]


def test_infinities_land_on_the_outermost_codes():
    x = tensor([-math.inf, math.inf])
    assert encode(x, tensor(0.5), 0.0, -8, 7).tolist() == [-8, 7]
    assert encode(x, tensor(0.5), tensor(3.0), -8, 7).tolist() == [-8, 7]


def test_nan_stays_nan():
    assert encode(tensor([math.nan]), tensor(0.5), 0.0, -8, 7).isnan().all()


def test_zero_range_has_scale_one_and_keeps_zeros():
    zeros = torch.zeros(3)
    assert symmetric_scale(zeros, 4).tolist() == reader_scale(zeros, 4).tolist() == [1, 1, 1]
    scale, zero = affine_scale(zeros, zeros, 4)
    assert scale.tolist() == [1, 1, 1]
    assert decode(encode(zeros, scale, zero, -8, 7), scale, zero).tolist() == [0, 0, 0]


def test_empty_and_one_element():
    assert encode(torch.empty(0), tensor(1.0), 0.0, -8, 7).shape == (0,)
    assert encode(tensor([0.3]), tensor([0.1]), 0.0, -8, 7).tolist() == [3]


def test_symmetric_scale_hand_values():
    assert symmetric_scale(tensor([7.0, 14.0]), 4).tolist() == [1, 2]
    assert symmetric_scale(tensor(127.0), 8).item() == 1
    assert symmetric_scale(tensor(3.0), 1).item() == 6  # levels -3 and +3


def test_reader_scale_is_half_a_code_wider():
    assert reader_scale(tensor(127.5), 8).item() == 1


def test_affine_scale_hand_values():
    scale, zero = affine_scale(tensor([0.0, -1.0, 2.0, -3.0]), tensor([15.0, 14.0, 6.0, -1.5]), 4)
    assert scale.tolist() == pytest.approx([1, 1, 0.4, 0.2])  # a range off 0 is widened to hold it
    assert zero.tolist() == [-8, -7, -8, 7]


def test_encode_leaves_its_input_alone_and_keeps_gradients():
    x = tensor([0.3, 5.0], requires_grad=True)
    with torch.no_grad():
        before = x.clone()
        encode(x, tensor(1.0), 0.0, -2, 1)
    assert torch.equal(x, before)
    assert encode(x, tensor(1.0), 0.0, -2, 1).requires_grad


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_the_oracle(bits, symmetric):
    x = torch.randn(7, 33, dtype=torch.float64) + 0.3
    low, high = x.aminmax(dim=1)
    scale, zero = scale_and_zero(low * 0.8, high * 0.8, bits, symmetric)
    lo, hi = low.numpy() * 0.8, high.numpy() * 0.8
    if symmetric:
        assert zero is None
        s, z = oracle.scale_symmetric(np.maximum(-lo, hi), bits), np.full(7, -0.5 if bits == 1 else 0.0)
    else:
        s, z = oracle.scale_affine(lo, hi, bits)
        np.testing.assert_array_equal(zero.numpy(), z)
    np.testing.assert_allclose(scale.numpy(), s, rtol=1e-15)
    point = tensor(z)[:, None]
    assert code_bounds(bits) == oracle.bounds(bits)
    code = encode(x, scale[:, None], point, *code_bounds(bits))
    np.testing.assert_array_equal(code.numpy(), oracle.code(x.numpy(), s[:, None], z[:, None], *oracle.bounds(bits)))
    real = decode(code, scale[:, None], point)
    np.testing.assert_allclose(
        real.numpy(), oracle.quantize(x.numpy(), s[:, None], z[:, None], *oracle.bounds(bits)), rtol=1e-14
    )


def _on(x, scale, zero, bits):
    return decode(encode(x, scale, zero, *code_bounds(bits)), scale, zero)


@given(values, widths, scales)
def test_idempotent(x, bits, scale):
    once = _on(tensor(x), tensor(scale), fixed_zero(bits), bits)
    assert torch.equal(_on(once, tensor(scale), fixed_zero(bits), bits), once)


@given(values, widths, scales)
def test_on_grid_and_within_half_a_step(x, bits, scale):
    x, s, z = tensor(x), tensor(scale), fixed_zero(bits)
    low, high = code_bounds(bits)
    code = encode(x, s, z, low, high)
    assert torch.equal(code, code.round())
    assert code.min() >= low
    assert code.max() <= high
    covered = (x / s + z >= low) & (x / s + z <= high)
    assert ((decode(code, s, z) - x).abs() <= 0.50001 * s)[covered].all()


@given(values, widths, scales)
def test_monotone(x, bits, scale):
    y = _on(tensor(x).sort().values, tensor(scale), fixed_zero(bits), bits)
    assert (y.diff() >= 0).all()


@given(values, widths, st.integers(-6, 6))
def test_scaling_data_by_a_power_of_two_scales_the_result(x, bits, power):
    """A symmetric range read off the data makes quantization commute with exact scaling."""
    x, factor = tensor(x), 2.0**power
    if 0 < x.abs().max() < 1e-30:
        return  # subnormal numbers do not scale exactly
    scale, scaled = symmetric_scale(x.abs().max(), bits), symmetric_scale((x * factor).abs().max(), bits)
    z = fixed_zero(bits)
    if not x.any():
        factor = 1.0  # an all-zero range keeps scale 1
    assert torch.equal(_on(x * factor, scaled, z, bits), _on(x, scale, z, bits) * factor)


@given(st.floats(-50, 50, width=32), st.floats(-50, 50, width=32), st.sampled_from((2, 3, 4, 8)))
def test_affine_grids_hold_zero_and_cover_the_range(a, b, bits):
    low, high = tensor(min(a, b)), tensor(max(a, b))
    scale, zero = affine_scale(low, high, bits)
    first, last = code_bounds(bits)
    assert zero == zero.round()
    assert first <= zero <= last
    assert _on(tensor(0.0), scale, zero, bits) == 0
    for end in (low, high):
        assert (_on(end, scale, zero, bits) - end).abs() <= 0.501 * scale
