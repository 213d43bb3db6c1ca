"""Ranges read off data, against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import tensor

from lightning_quant.grid import Grid
from lightning_quant.observers import OBSERVERS, build_observer
from lightning_quant.observers.ema import Ema
from lightning_quant.observers.minmax import MinMax
from lightning_quant.observers.mse import Mse
from tests import oracle

ROWS = tensor([[-3.0, 0.5, 2.0], [0.0, 0.0, 0.0], [1.0, 4.0, 2.0]])


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_contract(name, symmetric):
    """One (low, high) per row, ordered, inside the data, untouched input; zeros and single elements work."""
    for rows in (ROWS, torch.zeros(2, 5), torch.randn(4, 1), torch.randn(3, 64)):
        before = rows.clone()
        low, high = OBSERVERS[name]().range(rows, Grid(4, symmetric))
        assert low.shape == high.shape == (len(rows),)
        assert (low <= high).all()
        assert torch.equal(rows, before)
        assert (high <= rows.amax(dim=1).clamp(min=0)).all()
        assert (low >= rows.amin(dim=1).clamp(max=0)).all()


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
