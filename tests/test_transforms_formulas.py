"""The formulas of the set-up transforms against hand values and float64 oracles written from the papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig
from lightning_quant.transforms import TRANSFORMS, correct_bias, ocs
from lightning_quant.transforms.absorb_bias import absorbed
from lightning_quant.transforms.awq import awq_factors
from lightning_quant.transforms.cayley import cayley_step
from lightning_quant.transforms.clip import clipped_weight
from lightning_quant.transforms.correct_bias import relu_mean
from lightning_quant.transforms.correct_weights import corrected
from lightning_quant.transforms.equalize import equalizing_factors
from lightning_quant.transforms.grids import layer_grids
from lightning_quant.transforms.ocs import split, split_weight
from lightning_quant.transforms.outputs import applied_to, sums_over_inputs
from lightning_quant.transforms.rotate import random_hadamard
from lightning_quant.transforms.rotation import turn_inputs, turn_outputs
from lightning_quant.transforms.smoothquant import smooth_factors, weight_absmax


def close(got: torch.Tensor, want: object, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(got.double().numpy(), np.asarray(want, dtype=np.float64), rtol=tolerance)


@pytest.mark.parametrize(
    ("alpha", "want"), [(0.5, [2, 0.70710678, 5.65685425]), (0.85, [3.24900959, 0.90125046, 11.71268557])]
)
def test_smoothing_by_hand(alpha, want):
    x, w = torch.tensor([4.0, 1, 16]), torch.tensor([1, 2, 0.5])
    s = smooth_factors(x, w, alpha)
    close(s, want)
    if alpha == 0.5:
        close(x / s, w * s)  # both sides are as hard


def test_smoothing_against_the_oracle():
    x, w = torch.rand(50) * 100, torch.rand(50)
    x[3] = w[4] = 0  # clamped
    a, b = np.maximum(x.double().numpy(), 1e-5), np.maximum(w.double().numpy(), 1e-5)
    for alpha in (0.0, 0.3, 1.0):
        close(smooth_factors(x, w, alpha), a**alpha / b ** (1 - alpha))


def test_equalization_by_hand():
    r1, r2 = torch.tensor([8, 0.5]), torch.tensor([0.5, 2])
    s = equalizing_factors(r1, r2)
    close(s, [4, 0.5])
    close(r1 / s, [2, 1])
    close(r2 * s, [2, 1])
    close(equalizing_factors(torch.tensor([0.0, 3]), torch.tensor([1.0, 0])), [1, 1])  # nothing to share


def test_equalization_against_the_oracle():
    r1, r2 = torch.rand(40) + 0.01, torch.rand(40) * 9 + 0.01
    one, two = r1.double().numpy(), r2.double().numpy()
    close(equalizing_factors(r1, r2), np.sqrt(one * two) / two)


def test_absorbed_bias():
    close(absorbed(torch.tensor([5.0, 1, 6]), torch.tensor([1.0, 1, -1])), [2, 0, 3])


def test_mean_behind_a_relu():
    close(relu_mean(torch.tensor([0.5]), torch.tensor([2.0])), [1.07268940])
    z = np.linspace(-12, 12, 200001)
    density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    for beta, gamma in ((-1.0, 0.7), (2.0, -0.5), (0.0, 1.0)):
        want = np.trapezoid(np.maximum(beta + abs(gamma) * z, 0) * density, z)
        close(relu_mean(torch.tensor([beta]), torch.tensor([gamma])), [want], 1e-5)


def test_awq_against_the_oracle():
    x = torch.rand(30) * 10 + 1e-3
    m = x.double().numpy()
    for a in (0.0, 0.35, 0.95):
        s = m**a
        close(awq_factors(x, a), s / math.sqrt(s.max() * s.min()))


@pytest.mark.parametrize(("w", "naive", "aware"), [(3.0, 4, 3), (3.3, 4, 3), (-2.6, -2, -3)])
def test_splitting_by_hand(w, naive, aware):
    """Two halves round to what the whole rounds to, which halving alone does not."""

    def q(x):
        return math.floor(x + 0.5)

    assert 2 * q(w / 2) == naive
    first, second = split(torch.tensor(w), 1.0)
    assert q(float(first)) + q(float(second)) == aware == q(w)


def test_split_weights_hold_the_same_sum():
    """Input channel 1 is the largest; of its weights only those above half of it are split."""
    net = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.1, 8.0, 0.2], [0.3, 1.0, 0.4], [0.5, -6.0, 0.1]]))
    grid = layer_grids(net, QuantConfig.parse("ste", "w4a16-channel"))["0"]
    new, index = split_weight(net[0].weight, grid, 1)
    assert index.tolist() == [0, 1, 2, 1]
    torch.testing.assert_close(new[:, 1] + new[:, 3], net[0].weight[:, 1])
    assert new[1, 3] == 0
    assert new[1, 1] == 1
    assert float(new.abs().max()) < 4.5


def test_splitting_keeps_the_function_and_narrows_the_range():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    with torch.no_grad():
        net[0].weight[2, 1] *= 20
        net[3].weight[:, 7] *= 20
    x = torch.randn(5, 3, 8, 8)
    start, largest = net(x), float(net[3].weight.detach().abs().max())
    report = ocs(net, [x], QuantConfig.parse("ste", "w4a16-channel"), expand=0.01)
    assert len(report.applied) == 2
    assert report.difference < 1e-5
    torch.testing.assert_close(net(x), start, rtol=1e-5, atol=1e-5)
    assert net[3][1].in_features == 8 * 36 + 3
    assert float(net[3][1].weight.detach().abs().max()) < 0.6 * largest


def test_corrected_rows_have_the_float_mean_and_norm():
    w = torch.randn(6, 40, dtype=torch.float64)
    rounded = torch.round(w * 1.5) / 1.5 + 0.1
    rounded[5] = 0.5  # all alike: no spread to stretch
    got = corrected(rounded, w)
    a, b = w.numpy(), rounded.numpy()
    mu = a.mean(1, keepdims=True) - b.mean(1, keepdims=True)
    spread = np.linalg.norm(b - b.mean(1, keepdims=True), axis=1, keepdims=True)
    xi = np.linalg.norm(a - a.mean(1, keepdims=True), axis=1, keepdims=True)[:5] / spread[:5]
    close(got[:5], xi * (b + mu)[:5], 1e-9)
    close(got[5], (b + mu)[5], 1e-9)


def test_clipping_against_the_search_by_hand():
    """Per output channel the limit of ten with the least squared error in the output."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(16, 3, bias=False))
    with torch.no_grad():
        net[0].weight[0, 0] = 2
    config = QuantConfig.parse("ste", "w3a16-channel", observer="minmax")
    grid, w, x = layer_grids(net, config)["0"], net[0].weight.detach(), torch.randn(64, 16)
    x[:, 0] *= 0.02
    got = clipped_weight(w, x, grid)
    for row in range(3):
        own, errors = w[row].double().numpy(), []
        for i in range(10):
            limit = abs(own).max() * (1 - i / 20)
            clipped = np.clip(own, -limit, limit)
            step = float(_step(grid, torch.tensor(clipped).float()))
            codes = np.clip(np.round(clipped / step), -4, 3)
            errors.append((np.square((codes * step - own) @ x.double().numpy().T).mean(), limit))
        limit = min(errors)[1]
        close(got[row], np.clip(own, -limit, limit), 1e-5)
    assert float(got[0].abs().max()) < 2


def _step(grid, row):
    """The smallest distance between levels that a row is rounded to."""
    levels = torch.unique(grid.weight(row.repeat(3, 1))[0])
    return (levels[1:] - levels[:-1]).min()


@pytest.mark.parametrize("size", [1, 2, 16, 12, 7, 40])
def test_rotations_are_orthogonal(size):
    h = random_hadamard(size, seed=3)
    torch.testing.assert_close(h @ h.T, torch.eye(size, dtype=torch.float64))
    if size in (2, 16):
        close(h.abs(), np.full((size, size), size**-0.5), 1e-12)
    assert not torch.equal(h, random_hadamard(size, seed=4)) or size == 1


def test_cayley_steps_against_the_iteration_of_the_paper():
    """Y = X + a/2 W (X + Y), W = W_hat - W_hat^T, W_hat = M X^T - X (X^T M X^T) / 2, in float64 until it stands."""
    draw = np.random.default_rng(0)
    x, _ = np.linalg.qr(draw.normal(size=(12, 12)))
    for lr, large in ((0.05, 1.0), (1.5, 1e-2), (1.5, 30.0)):
        g = large * draw.normal(size=(12, 12))
        m = -g
        w = m @ x.T - x @ (x.T @ m @ x.T) / 2
        w = w - w.T
        step = min(lr, 1 / np.abs(w).sum(axis=0).max())
        y = x + step * m
        for _ in range(200):
            y = x + step / 2 * w @ (x + y)
        close(cayley_step(torch.tensor(x), torch.tensor(g), lr), y, 1e-6)


def test_cayley_steps_stay_orthogonal_and_go_down():
    """From random rotations to the nearest one of a matrix, which is known: U V^T of its singular vectors."""
    draw = torch.Generator().manual_seed(0)
    aim = torch.randn(16, 16, dtype=torch.float64, generator=draw)
    u, _, v = torch.linalg.svd(aim)
    u[:, -1] *= torch.det(u @ v)  # within reach of a rotation that starts at determinant 1
    x = torch.eye(16, dtype=torch.float64)
    losses = []
    for _ in range(800):
        losses.append(float((x - aim).square().sum()))
        x = cayley_step(x, 2 * (x - aim), 0.1)
    one = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(x @ x.T, one, atol=1e-10, rtol=0)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(losses))
    torch.testing.assert_close(x, u @ v, atol=1e-3, rtol=0)
    torch.testing.assert_close(cayley_step(x, torch.zeros_like(x), 1.5), x)


def test_rotated_blocks_by_hand():
    """Weights are turned block by block: W R for what reads, R^T W and R^T b for what writes."""
    w, b = torch.arange(12.0, dtype=torch.float64).view(4, 3), torch.arange(4.0, dtype=torch.float64)
    r = random_hadamard(2, seed=5)
    blocks = np.kron(np.eye(2), r.numpy())
    close(turn_outputs(w, r), blocks.T @ w.numpy())
    close(turn_outputs(b, r), blocks.T @ b.numpy())
    close(turn_inputs(w.T, r), w.T.numpy() @ blocks)


def test_empirical_bias_correction_against_the_oracle():
    """b - E[(Q(W) - W) x]."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 5))
    x, config = torch.randn(40, 8) + 1, QuantConfig.parse("ste", "w2a16-channel")
    w, b = (p.detach().double().numpy().copy() for p in (net[0].weight, net[0].bias))
    rounded = layer_grids(net, config)["0"].weight(net[0].weight.detach()).double().numpy()
    correct_bias(net, [x[:25], x[25:]], config)
    want = b - ((rounded - w) @ x.double().numpy().T).mean(axis=1)
    assert np.abs(want - b).max() > 0.01
    np.testing.assert_allclose(net[0].bias.detach().numpy(), want, atol=1e-5)


LAYERS = (
    nn.Linear(6, 4),
    nn.Conv2d(6, 4, 3),
    nn.Conv2d(6, 6, 3, groups=6),
    nn.Conv2d(6, 4, 3, groups=2, bias=False),
    nn.Conv1d(6, 4, 3),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_constant_inputs_add(layer):
    """The sum over a kernel equals the layer on channels that are constant; per input channel the largest weight."""
    x = torch.randn(6)
    shape = {nn.Linear: (1, 6), nn.Conv2d: (1, 6, 5, 5), nn.Conv1d: (1, 6, 5)}[type(layer)]
    wide = x.view(1, 6, *(1,) * (len(shape) - 2)).expand(shape)
    out = applied_to(layer, layer.weight, wide).flatten(2).mean(2) if len(shape) > 2 else layer(wide) - layer.bias
    close(sums_over_inputs(layer, layer.weight, x).detach(), out[0].detach(), 1e-4)
    found, groups = weight_absmax(layer), getattr(layer, "groups", 1)
    rows = layer.weight.detach().abs().view(groups, -1, *layer.weight.shape[1:])
    for channel in range(6):
        own = rows[channel // (6 // groups), :, channel % (6 // groups)]
        assert float(found[channel]) == float(own.max())


def test_the_registry_lists_functions_that_say_where_they_come_from():
    for name, transform in TRANSFORMS.items():
        assert transform.__name__ == name
        assert "Source:" in transform.__doc__ or name == "clip_weights"
