"""Two-step quantization: levels against published optima, scales against brute force, and the order of the steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.estimators.half_normal import half_normal_levels
from lightning_quant.estimators.tsq import Tsq, TsqInput
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.observers.als import Als
from lightning_quant.observers.rms import Rms
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation
from lightning_quant.scheme import TensorSpec
from tests.loop import Run, check_folded, check_run, convolutional, weights_lie_on_their_grid
from tests.oracle import bounds
from tests.oracle import tsq as oracle

# --- levels of inputs -----------------------------------------------------------------------------------------------


def test_vector_half_normal():
    assert half_normal_levels(1, 0.0)[1] == pytest.approx([0.7979], abs=5e-5)
    ends, levels = half_normal_levels(2, 0.0)
    assert levels == pytest.approx([0.45278, 1.51042], abs=5e-6)
    assert ends == pytest.approx([0.0, 0.9816], abs=5e-5)


@pytest.mark.parametrize(("count", "theta"), [(1, 0.9), (3, 0.0), (3, 0.25), (7, 0.5), (15, 0.25)])
def test_levels_against_lloyds_iteration(count, theta):
    want, epsilon = oracle.lloyd_max(count, theta)
    ends, levels = half_normal_levels(count, theta)
    assert levels == pytest.approx(want, abs=1e-11)
    assert ends[0] == pytest.approx(epsilon, abs=1e-12)


@pytest.mark.parametrize("theta", [0.0, 0.25, 0.999])
@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_every_width_ascend_between_their_ends(bits, theta):
    ends, levels = map(np.array, half_normal_levels(2**bits - 1, theta))
    assert (np.diff(levels) > 0).all()
    assert ends[1:] == pytest.approx((levels[1:] + levels[:-1]) / 2)
    assert (levels > ends).all()


def of_inputs(bits=2, sigma=1.0, dtype=torch.float64, **options):
    rule = TsqInput(**options)
    spec = resolve_activation(TensorSpec(bits), False, rule)
    q = FakeQuantizer(spec, Granularity(spec.granularity, None), rule, channels=4, dtype=dtype)
    q.set_range(tensor([-sigma * q.grid.top], dtype=dtype), tensor([sigma * q.grid.top], dtype=dtype))
    return q


def test_inputs_by_hand():
    """theta = 1/2: epsilon = .67449 sigma, the quartile; up to it 0, beyond it three levels, scaled by sigma."""
    q = of_inputs(sigma=2.0, theta=0.5)
    levels = oracle.lloyd_max(3, 0.5)[0] * 2
    middle = (levels[0] + levels[1]) / 2
    x = [-5.0, 0.0, 1.34, 1.36, middle - 1e-6, middle + 1e-6, levels[2], 100.0]
    x = tensor(x, dtype=torch.float64, requires_grad=True)
    y = q(x)
    y.sum().backward()
    want = [0, 0, 0, levels[0], levels[0], levels[1], levels[2], levels[2]]
    assert y.tolist() == pytest.approx(want, abs=1e-11)
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]


def test_signed_inputs_have_mirrored_levels():
    q = of_inputs(bits=3, theta=0.25, signed=True)
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert torch.equal(y, -q(-x))
    levels = oracle.lloyd_max(3, 0.25)[0]
    assert y.unique().tolist() == pytest.approx([*-levels[::-1], 0, *levels])
    assert (x.grad == (x.abs() <= levels[-1])).all()


@pytest.mark.parametrize("theta", [0.0, 0.25, 0.6])
def test_the_share_of_zeros_is_theta(theta):
    q = of_inputs(bits=4, theta=theta)
    x = torch.randn(100_000, dtype=torch.float64)
    zeros = (q(x)[x > 0] == 0).double().mean()
    assert zeros == pytest.approx(theta, abs=0.01)


def test_casting_the_model_leaves_the_levels():
    q = of_inputs(bits=8, theta=0.0, dtype=torch.float32)
    x = torch.rand(64)
    want = q(x)
    assert torch.equal(q.bfloat16().float()(x), want)


def test_rms_looks_at_what_is_not_zero():
    grid = Grid(4)
    low, high = Rms().range(tensor([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), grid)
    assert high.tolist() == pytest.approx([7 * 12.5**0.5, 0.0])
    assert torch.equal(low, -high)
    scale, _ = grid.scale_and_zero(low, high)
    assert scale.tolist() == pytest.approx([12.5**0.5, 1.0])
    old, new = (tensor([-1.0]), tensor([1.0])), (tensor([-2.0]), tensor([2.0]))
    assert Rms(decay=0.75).merge(old, new)[1].item() == 1.25


def test_before_any_data_each_sample_has_its_own_sigma():
    run = Run("tsq", "w1.58a4")
    q = run.model[0].input_quant
    x = torch.randn(3, 8)
    y = q(x)
    for row, out in zip(x, y, strict=True):
        sigma = row.square().mean().sqrt().double().numpy()
        want, _ = oracle.sparse(row.double().numpy(), np.full(8, sigma), 4, 0.25)
        np.testing.assert_allclose(out.detach(), want, rtol=1e-5)


# --- scales of weights ----------------------------------------------------------------------------------------------


def scale_of(w, bits, **kind):
    grid = Grid(bits, **kind)
    return grid.scale_and_zero(*Als().range(w, grid))[0].double().numpy()


def test_ternary_scales_are_those_of_the_best_support():
    w = torch.randn(12, 8)
    w[3] = 0
    w[4, 1:] = 0
    w[5] = w[5].sign()
    got = scale_of(w, 1.58)
    for row, alpha in zip(w.double().numpy(), got, strict=True):
        best, error = oracle.ternary_by_force(row)
        if not row.any():
            assert alpha == 1
            continue
        assert alpha == pytest.approx(best, rel=1e-6)
        t = np.clip(np.round(row / alpha), -1, 1)
        assert np.sum((row - alpha * t) ** 2) == pytest.approx(error, abs=1e-9)


def test_ternary_scales_of_long_rows_and_of_narrow_two_bits():
    w = torch.randn(3, 5000) ** 3
    want = [oracle.ternary_by_sorting(row) for row in w.double().numpy()]
    assert scale_of(w, 1.58) == pytest.approx(want, rel=1e-6)
    assert scale_of(w, 2, narrow=True) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [1, 3])
def test_other_scales_are_close_to_the_best(bits, power):
    """The best of 1000 scales; heavy tails need much smaller ones than absmax; one more turn changes little."""
    w = (torch.randn(16, 300) ** power).double().numpy()
    low, high = bounds(bits)

    def errors(a):
        return np.sum((w - a[:, None] * np.clip(np.round(w / a[:, None]), low, high)) ** 2, axis=1)

    got, largest = scale_of(tensor(w), bits), np.abs(w).max(axis=1) / high
    best = np.min([errors(f * largest) for f in np.geomspace(0.02, 1, 1000)], axis=0)
    assert np.mean(errors(got) / best) < 1.05
    turned = np.array([oracle.alternate(row, bits, alpha, 1) for row, alpha in zip(w, got, strict=True)])
    assert (errors(turned) >= 0.98 * errors(got)).all()


def test_binary_scale_is_the_mean_magnitude():
    """Levels of one bit are +-alpha / 2."""
    w = torch.randn(3, 50)
    np.testing.assert_allclose(scale_of(w, 1), 2 * w.abs().mean(dim=1), rtol=1e-5)


def test_codebooks_and_asymmetric_grids_have_scales_too():
    w = torch.randn(3, 64) + 0.5
    grid = Grid(4, kind="nf4")
    scale = grid.scale(Als().range(w, grid)[1])
    t = grid.round(w / scale[:, None], grid.table())
    best = (w * t).sum(dim=1) / t.square().sum(dim=1)
    torch.testing.assert_close(scale, best, rtol=0.01, atol=0)
    low, high = Als().range(w, Grid(4, symmetric=False))
    assert (low < 0).all()
    assert (high > 0).all()


# --- the steps ------------------------------------------------------------------------------------------------------


def test_weights_follow_after_the_switch():
    run = Run("tsq", "w1.58a2", total=8, switch=0.5)
    layer = run.model[0]
    q, w = layer.weight_quant, layer.weight
    for step in range(8):
        run.steps(step, step + 1)
        assert torch.equal(q.train()(w), w) == (step < 4)
        assert len(q.eval()(w)[0].unique()) <= 3
        assert torch.equal(q(w), q.on_grid(w))
    x = torch.linspace(-3, 3, 600).reshape(75, 8)
    assert len(layer.input_quant.train()(x).unique()) == 4


def test_weights_beyond_the_levels_are_trained():
    run = Run("tsq", "w1.58a16", switch=0.0)
    q = run.model[0].weight_quant.train()
    w = run.model[0].weight.detach().clone().requires_grad_()
    y = q(w)
    y.backward(torch.full_like(w, 2.0))
    assert (y.abs() < w.abs().amax(dim=1, keepdim=True)).all()
    assert (w.grad == 2).all()


@pytest.mark.parametrize(("scheme", "options"), [("w1.58a2", {"signed": True}), ("w4a4-g8", {}), ("w2a16", {})])
def test_training(scheme, options, tmp_path):
    run = check_run(lambda: Run("tsq", scheme, lr=0.02, **options), drop=0.85)
    if scheme.endswith("a16"):
        check_folded(run, tmp_path / "out")


def test_convolutions():
    run = Run("tsq", "w1.58a4", convolutional(), total=24).steps(0, 24)
    assert run.losses[-1] < run.losses[0]
    weights_lie_on_their_grid(run.model)
    assert run.model[2].weight_quant.spec.granularity == "channel"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Tsq(theta=1.0), r"tsq.theta: expected a share in \[0, 1\), got 1.0"),
        (lambda: Tsq(switch=-0.1), r"tsq.switch: expected a share in \[0, 1\)"),
        (lambda: Als(starts=0), "Als: expected starts >= 1"),
        (lambda: Run("tsq", "w2a1"), "0.input: method 'tsq': expected 2 to 8 bits, got 1"),
        (lambda: Run("tsq", "w2a2-dynamic"), "0.input: method 'tsq': expected dynamic=False"),
        (lambda: Run("tsq", "w2a2-asym"), "0.weight: method 'tsq': expected symmetric=True"),
        (lambda: Run("tsq", "w4a16", nn.Sequential(nn.Linear(8, 8)), observer="mse"), "expected observer='als'"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
