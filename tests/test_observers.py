"""Ranges read off data, against brute force in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import tensor

from lightning_quant.grid import Grid
from lightning_quant.observers import OBSERVERS, build_observer
from lightning_quant.observers.absmean import AbsMean
from lightning_quant.observers.bn_stats import BnStats
from lightning_quant.observers.ema import Ema
from lightning_quant.observers.half_gauss import STEPS, HalfGauss, HalfGaussUnit
from lightning_quant.observers.lp import Lp
from lightning_quant.observers.minmax import MinMax
from lightning_quant.observers.mse import Mse
from lightning_quant.observers.rms import Rms
from lightning_quant.observers.twn import Twn as TwnObserver
from lightning_quant.observers.unit import Unit
from tests import oracle
from tests.oracle.hwgq import best_step

ROWS = tensor([[-3.0, 0.5, 2.0], [0.0, 0.0, 0.0], [1.0, 4.0, 2.0]])


# Ranges of a distribution with the data's moments; they may lie beyond the data.
MODELLED = {"lsq_init", "three_sigma", "half_gauss", "rms", "aciq_gauss", "aciq_laplace"}


def built(name):
    """The observer as a model uses it: one needs the ends that attach finds."""
    return BnStats(-1.0, 2.0) if name == "bn_stats" else OBSERVERS[name]()


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_contract(name, symmetric):
    """One (low, high) per row, ordered, untouched input; zeros and single elements work.

    The range lies inside the data, or inside its magnitudes where both ends are as far from 0.
    """
    for rows in (ROWS, torch.zeros(2, 5), torch.randn(4, 1), torch.randn(3, 64)):
        before = rows.clone()
        low, high = built(name).range(rows, Grid(4, symmetric))
        assert low.shape == high.shape == (len(rows),)
        assert (low <= high).all()
        assert torch.equal(rows, before)
        assert low.isfinite().all()
        assert high.isfinite().all()
        if OBSERVERS[name].data_free or name in MODELLED:
            continue
        size = rows.abs().amax(dim=1) * (1 + 1e-6) + 1e-7
        mirrored = low == -high
        assert (high <= size.where(mirrored, rows.amax(dim=1).clamp(min=0))).all()
        assert (low >= (-size).where(mirrored, rows.amin(dim=1).clamp(max=0))).all()


@pytest.mark.parametrize("name", [n for n, kind in OBSERVERS.items() if kind.data_free])
def test_data_free_ranges_need_no_data(name):
    none = built(name).range(torch.empty(2, 0), Grid(3, False))
    some = built(name).range(torch.randn(2, 9), Grid(3, False))
    assert torch.equal(none[0], some[0])
    assert torch.equal(none[1], some[1])


@pytest.mark.parametrize(("symmetric", "low"), [(True, -1), (False, 0)])
def test_unit(symmetric, low):
    assert [end.tolist() for end in Unit().range(ROWS, Grid(2, symmetric))] == [[low] * 3, [1] * 3]


def test_absmean_hand_values():
    """XNOR-Net's alpha; the average over steps is that of ema."""
    row = tensor([[0.5, -0.1, 0.3, -0.8, 0.05, 0.02]])
    low, high = AbsMean().range(row, Grid(1))
    assert high.item() == -low.item() == pytest.approx(0.295)
    low, high = AbsMean(decay=0.75).merge((tensor([-1.0]), tensor([1.0])), (tensor([-5.0]), tensor([5.0])))
    assert (low.item(), high.item()) == (-2, 2)


def test_absmean_has_the_least_squared_error_of_two_levels():
    row = torch.randn(1, 500, dtype=torch.float64) ** 3
    best = AbsMean().range(row, Grid(1))[1]
    errors = [(row - a * row.sign()).square().sum() for a in (0.99 * best, best, 1.01 * best)]
    assert errors[1] < min(errors[0], errors[2])


def test_mean_of_bfloat16_is_taken_in_float32():
    row = (1 + torch.rand(1, 4096)).bfloat16()
    for kind in (AbsMean, TwnObserver):
        high = kind().range(row, Grid(1))[1]
        assert high.dtype == torch.float32
        assert high.item() == pytest.approx(kind().range(row.double(), Grid(1))[1].item(), rel=1e-6)


def test_twn_hand_values():
    row = tensor([[0.5, -0.1, 0.3, -0.8, 0.05, 0.02]])
    assert TwnObserver().range(row, Grid(1.58))[1].item() == pytest.approx(0.53333333)


@pytest.mark.parametrize("bits", range(1, 9))
def test_half_gauss_steps_have_the_least_squared_error(bits):
    """Stationary: sum of k E[x; x gets k] = q sum of k^2 P(x gets k), with closed forms on the half normal."""
    q, levels = STEPS[bits - 1], 2**bits - 1
    edges = [0.0, *((k + 0.5) * q for k in range(1, levels)), math.inf]
    density = [math.sqrt(2 / math.pi) * math.exp(-e * e / 2) for e in edges]
    below = [math.erf(e / math.sqrt(2)) for e in edges]
    first = sum(k * (density[k - 1] - density[k]) for k in range(1, levels + 1))
    second = sum(k * k * (below[k] - below[k - 1]) for k in range(1, levels + 1))
    assert first / second == pytest.approx(q, rel=2e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_half_gauss_steps_by_search(bits):
    assert STEPS[bits - 1] == pytest.approx(best_step(bits), rel=2e-4)


def test_half_gauss_measures_the_rms_of_positive_values():
    rows = tensor([[3.0, -100.0, 4.0, 0.0], [-1.0, 0.0, -2.0, -5.0]])
    low, high = HalfGauss().range(rows, Grid(2, False))
    assert low.tolist() == [0, 0]
    assert high.tolist() == pytest.approx([math.sqrt(12.5) * 3 * 0.53881192, 0])
    assert HalfGaussUnit().range(rows, Grid(2, False))[1].tolist() == pytest.approx([3 * 0.53881192] * 2)
    normal = torch.randn(1, 100000, generator=torch.Generator().manual_seed(0)) * 2.5
    for data in (normal, normal.relu()):
        assert HalfGauss().range(data, Grid(1, False))[1].item() == pytest.approx(2.5 * 0.79788456, rel=0.01)


def test_minmax():
    low, high = MinMax().range(ROWS, Grid(8))
    assert low.tolist() == [-3, 0, 1]
    assert high.tolist() == [2, 0, 4]
    merged = MinMax().merge((low, high), (low + 1, high + 1))
    assert merged[0].tolist() == [-3, 0, 1]
    assert merged[1].tolist() == [3, 1, 5]


def test_ema_is_a_recursive_average():
    observer, seen = Ema(decay=0.75), [tensor([1.0]), tensor([5.0]), tensor([-3.0])]
    state = (-seen[0], seen[0])
    expected = 1.0
    for new in seen[1:]:
        state = observer.merge(state, (-new, new))
        expected = 0.75 * expected + 0.25 * new.item()
    assert state[1].item() == pytest.approx(expected) == pytest.approx(0.75)
    assert state[0].item() == pytest.approx(-expected)


def test_ema_range_is_the_batch_range():
    assert [end.tolist() for end in Ema().range(ROWS, Grid(8))] == [[-3, 0, 1], [2, 0, 4]]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_refuses(decay):
    with pytest.raises(ValueError, match=r"Ema.decay: expected a number in \[0, 1\)"):
        Ema(decay)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_finds_the_best_factor(bits, symmetric):
    """No factor of the search grid has a smaller error than the one found."""
    rows = torch.randn(5, 200, generator=torch.Generator().manual_seed(3)) ** 3
    observer = Mse()
    low, high = observer.range(rows, Grid(bits, symmetric))
    factors = np.linspace(1, observer.smallest, observer.candidates)
    for i, row in enumerate(rows.double().numpy()):
        found = high[i].item() / row.max()
        assert low[i].item() / row.min() == pytest.approx(found, rel=1e-5)
        assert np.abs(factors - found).min() < 1e-5
        errors = oracle.best_shrink(row, bits, symmetric, factors)
        here = oracle.best_shrink(row, bits, symmetric, [found])[0]
        assert here <= errors.min() * (1 + 1e-4)
    if symmetric and bits <= 3:
        assert (high < rows.amax(dim=1)).all()  # heavy tails are cut


def test_mse_in_steps_of_one_percent_by_hand():
    """On levels -3..3 the best clip of 1.9 is 1.881, whose mean squared error is 0.02209133 instead of 0.02222222."""
    row = tensor([[-1.9, -0.6, -0.2, 0.1, 0.4, 0.8]])
    high = Mse(candidates=80, smallest=0.21).range(row, Grid(3, narrow=True))[0].abs()
    assert high.item() == pytest.approx(1.881, abs=1e-6)
    for clip, error in ((1.881, 0.02209133), (1.9, 0.02222222)):
        x, step = row.double().numpy(), clip / 3
        assert np.square(np.clip(np.round(x / step), -3, 3) * step - x).mean() == pytest.approx(error, abs=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lp_against_a_plain_loop(bits):
    """Of 80 clips, 1 % apart, the one with the least sum of |error|^2.4: wider than that of the squares."""
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(bits)) ** 3
    high = Lp().range(rows, Grid(bits, narrow=True))[1]
    top = 2 ** (bits - 1) - 1
    for i, x in enumerate(rows.double().numpy()):
        errors = []
        for percent in range(80):
            low, end = x.min() * (1 - percent / 100), x.max() * (1 - percent / 100)
            step = max(-low, end) / top
            errors.append((np.abs(np.clip(np.round(x / step), -top, top) * step - x) ** 2.4).sum())
        found = round(100 * (1 - high[i].item() / x.max()))
        assert errors[found] <= min(errors) * (1 + 1e-4)
    squares = Mse(candidates=80, smallest=0.21).range(rows, Grid(bits, narrow=True))[1]
    assert (high >= squares - 1e-6).all()
    assert (high > squares).any()


def test_mse_of_a_row_already_on_a_grid_keeps_the_range():
    row = torch.arange(-7.0, 8.0)[None]
    assert [end.item() for end in Mse().range(row, Grid(4))] == [-7, 7]


@pytest.mark.parametrize("settings", [{"candidates": 0}, {"smallest": 0.0}, {"smallest": 1.5}])
def test_mse_refuses(settings):
    with pytest.raises(ValueError, match="candidates >= 1 and 0 < smallest <= 1"):
        Mse(**settings)


def test_names():
    assert isinstance(build_observer("ema", "here"), Ema)
    with pytest.raises(ValueError, match=r"TensorSpec.observer: .*got 'minmx'. Did you mean observer 'minmax'"):
        build_observer("minmx", "TensorSpec.observer")


@pytest.mark.parametrize("name", [n for n, kind in OBSERVERS.items() if not kind.data_free])
def test_parts_of_a_batch_pool_to_the_range_of_the_whole(name):
    """Exactly for extremes and power means; a search or a fit is only averaged."""
    observer, grid = OBSERVERS[name](), Grid(4, symmetric=False)
    rows = torch.randn(1, 4000, dtype=torch.float64).clamp_(min=-1)
    rows[0, ::7] = 0
    noted = None
    for part in rows.split((1000, 3000), dim=1):
        noted = observer.pooled(noted, part, grid)
    low, high = observer.unpooled(noted)
    want_low, want_high = observer.range(rows, grid)
    exact = name in ("minmax", "ema", "seq_init", "absmean", "rms", "half_gauss")
    tolerance = 1e-12 if exact else 0.2
    torch.testing.assert_close(high, want_high, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(low, want_low, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n, kind in OBSERVERS.items() if not kind.data_free])
def test_a_repeated_forward_pools_to_the_same(name):
    """Activation checkpointing runs a layer twice."""
    observer, grid, rows = OBSERVERS[name](), Grid(4), torch.randn(1, 500, dtype=torch.float64)
    once = observer.pooled(None, rows, grid)
    twice = observer.pooled(once, rows, grid)
    torch.testing.assert_close(observer.unpooled(twice), observer.unpooled(once), rtol=1e-12, atol=0)


def test_power_mean_by_hand():
    observer, grid = Rms(), Grid(4)
    noted = observer.pooled(None, tensor([[3.0, -3.0, 0.0]]), grid)  # two values of square 9
    noted = observer.pooled(noted, tensor([[6.0]]), grid)  # one of 36
    assert observer.unpooled(noted)[1].item() == pytest.approx(7 * 18**0.5)
