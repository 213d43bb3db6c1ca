"""Integers alone: multipliers, requantization, folding, a whole layer, and the training that aims at it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.estimators.iao import Iao
from lightning_quant.grid import affine_scale
from lightning_quant.integer import fixed_point_multiplier, fold_batch_norm, requantize
from tests.loop import Run, check_folded, check_run, convolutional, mlp, weights_lie_on_their_grid


def test_vector_affine():
    """[-1, 2] in uint8: S = .0117647, z = 85; our codes are the same less 128."""
    scale, zero = affine_scale(tensor([-1.0]), tensor([2.0]), 8)
    assert scale.item() == pytest.approx(0.0117647, abs=5e-8)
    assert zero.item() + 128 == 85


def test_vector_multiplier():
    m0, shift = fixed_point_multiplier(tensor([0.0003], dtype=torch.float64))
    assert m0.dtype == shift.dtype == torch.int32
    assert m0.item() == 1319413953
    assert shift.item() == 11
    assert m0.item() * 2.0**-31 == pytest.approx(0.6144, abs=1e-9)


@pytest.mark.parametrize("m", [1e-9, 0.4999999999, 0.5, 0.75, 1 - 2.0**-53, 1.0, 3.7, 2.0**29])
def test_multipliers_are_normalised_and_exact_to_31_bits(m):
    m0, shift = (t.item() for t in fixed_point_multiplier(tensor(m, dtype=torch.float64)))
    assert 2**30 <= m0 < 2**31
    assert m0 * 2.0**-31 * 2.0**-shift == pytest.approx(m, rel=2.0**-31)


@pytest.mark.parametrize("m", [0.0, -1.0, float("nan"), 2.0**30])
def test_multipliers_out_of_range_are_refused(m):
    with pytest.raises(ValueError, match=r"fixed_point_multiplier: expected factors in \(0, 2\^30\)"):
        fixed_point_multiplier(tensor([0.5, m]))


@pytest.mark.parametrize("m", [1e-12, 1e-4, 0.0126, 0.3, 1.0, 5.5])
def test_requantize_is_exact_arithmetic(m):
    """Against Python's integers of any length: floor((2 * acc * M0 + 2^s) / 2^(s+1))."""
    edges = [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1]
    values = edges + np.random.default_rng(0).integers(-(2**20), 2**20, 200).tolist()
    m0, shift = fixed_point_multiplier(tensor(m, dtype=torch.float64))
    got = requantize(tensor(values, dtype=torch.int32), m0, shift, 7, -(2**15), 2**15 - 1)
    by = 31 + shift.item()
    want = [min(max(7 + ((2 * a * m0.item() + 2**by) >> (by + 1)), -(2**15)), 2**15 - 1) for a in values]
    assert got.dtype == torch.int32
    assert got.tolist() == want


def test_requantize_rounds_halves_up_and_saturates():
    m0, shift = fixed_point_multiplier(tensor(0.25))
    acc = tensor([2, -2, 6, -6, 1, -1, 4000, -4000], dtype=torch.int32)
    assert requantize(acc, m0, shift).tolist() == [1, 0, 2, -1, 0, 0, 127, -128]
    assert requantize(acc[-2:], m0, shift, 10, 0, 255).tolist() == [255, 0]


def test_vector_fold_batch_norm():
    w, b = fold_batch_norm(tensor([[0.6]]), None, tensor([1.5]), tensor([0.2]), tensor([0.4]), tensor([0.81]))
    assert w.item() == pytest.approx(0.99999383, rel=1e-7)
    assert b.item() == pytest.approx(-0.46666255, rel=1e-7)


@pytest.mark.parametrize("transposed", [False, True])
def test_folded_layers_compute_the_same(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer, norm = kind(3, 5, 2).double(), nn.BatchNorm2d(5).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm(layer(x))  # moves the running statistics
        want = norm.eval()(layer(x))
        w, b = fold_batch_norm(
            layer.weight,
            layer.bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            int(transposed),
        )
        layer.weight.copy_(w)
        layer.bias.copy_(b)
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["", "-tensor"])
def test_a_layer_on_integers_alone(granularity):
    """uint8 inputs, int8 weights, int32 sums and one multiplier per scale give the float layer's output codes."""
    run = Run("iao", f"w8a8{granularity}", calibration=10, total=10).steps(0, 10)
    run.controller.on_eval()
    layer, out_quant = run.model[0].eval(), run.model[2].input_quant
    with torch.no_grad():
        float_out = torch.relu(layer(run.x))
        s3, z3 = out_quant.scale.double(), int(out_quant.zero.item()) + 128
        want = torch.clamp(torch.round(float_out.double() / s3) + z3, 0, 255)

    s1, z1 = layer.input_quant.scale.double(), int(layer.input_quant.zero.item()) + 128
    x = torch.clamp(torch.round(run.x.double() / s1) + z1, 0, 255).to(torch.uint8)
    codes, s2, _, _ = layer.weight_quant.stored(layer.weight)
    assert codes.dtype == torch.int8
    assert codes.min() >= -127
    s2 = s2.double().reshape(-1)
    bias = torch.round(layer.bias.detach().double() / (s1 * s2)).to(torch.int32)
    acc = (x.to(torch.int32) - z1) @ codes.to(torch.int32).T + bias
    assert acc.dtype == torch.int32
    m0, shift = fixed_point_multiplier(s1 * s2 / s3)
    got = requantize(acc, m0, shift, z3, z3, 255)  # from the zero point on: the ReLU
    away = (got - want).abs()
    assert away.max() <= 1
    assert (away == 0).float().mean() > 0.98
    assert len(got.unique()) > 50


def test_weights_never_take_the_lowest_code():
    run = Run("iao", "w4a8")
    q = run.model[0].weight_quant
    weight = run.model[0].weight.detach().clone()
    weight[:, 0] = -1.0
    assert (q.low, q.high) == (-7, 7)
    assert q.stored(weight)[0].min() == -7
    assert q.on_grid(weight)[:, 0].tolist() == [-1.0] * 16


def test_inputs_wait_for_the_delay_while_their_ranges_follow_the_data():
    run = Run("iao", "w8a2", total=20, input_delay=0.5, calibration=2, lr=0.05)
    q = run.model[2].input_quant

    def is_float():
        x = torch.linspace(-3, 3, 32).reshape(2, 16).requires_grad_()
        y = q.train()(x)
        y.backward(torch.ones_like(y))
        q.noted = None
        assert x.grad.eq(1).all() == torch.equal(y, x)
        return torch.equal(y, x)

    seen = []
    for step in range(20):
        before = q.running.clone()
        run.steps(step, step + 1)
        seen.append((is_float(), not torch.equal(q.running, before)))
    assert seen == [(True, True)] * 10 + [(False, False)] * 10
    x = torch.randn(4, 16)
    assert len(q.eval()(x).unique()) <= 4
    run.controller.on_step(0)
    assert len(q.eval()(x).unique()) <= 4  # evaluation is on the grid before the delay is over, too


def test_no_delay():
    run = Run("iao", "w8a8", input_delay=0.0, calibration=2, total=None).steps(0, 3)
    x = torch.randn(4, 8)
    q = run.model[0].input_quant
    assert torch.equal(q.train()(x), q.eval()(x))
    assert not torch.equal(q(x), x)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-asym", "w4a4"])
def test_training(scheme):
    check_run(lambda: Run("iao", scheme, input_delay=0.25, lr=0.02), drop=0.75)


def test_convolutions_and_export(tmp_path):
    run = Run("iao", "w8a8", convolutional(), total=16).steps(0, 16)
    assert run.losses[-1] < run.losses[0]
    weights_lie_on_their_grid(run.model)
    check_folded(Run("iao", "w4a16", mlp(), total=4).steps(0, 4), tmp_path / "out")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Iao(input_delay=1.0), r"iao.input_delay: expected a share of the run in \[0, 1\), got 1.0"),
        (lambda: Run("iao", "w8a8-token"), "0.input: method 'iao': expected dynamic=False, got dynamic=True"),
        (lambda: Run("iao", "w4a8", learn_scale=True), "0.weight: method 'iao': expected learn_scale=False"),
        (lambda: Run("iao", "w4a8", grid="midrise"), "expected grid='int'"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
