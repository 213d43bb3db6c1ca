"""Ranges that clip: percentiles, divergence of histograms, bell curves; against brute force and known optima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn, tensor

from lightning_quant import QuantConfig, attach, calibrate
from lightning_quant.grid import Grid
from lightning_quant.observers import percentile
from lightning_quant.observers.aciq import AciqGauss, AciqLaplace, best_clip
from lightning_quant.observers.kl import Kl, divergence
from lightning_quant.observers.percentile import Percentile, quantile, smallest_by_histogram

# Ends of the range in spreads, 2 to 6 bits, by numerical minimization in closed form of the same error.
WIDE = {"gauss": [2.097, 2.407, 2.709, 3.021, 3.334], "laplace": [3.434, 4.313, 5.291, 6.364, 7.508]}
NARROW = {"gauss": [1.224, 1.952, 2.474, 2.899, 3.270], "laplace": [2.000, 3.486, 4.820, 6.098, 7.359]}


@pytest.mark.parametrize("family", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_best_clips_of_bell_curves(bits, family):
    half = 2 ** (bits - 1)
    wide = best_clip(Grid(bits), family, False) * half / (half - 1)  # the table's range has one step more
    assert wide == pytest.approx(WIDE[family][bits - 2], abs=6e-3)
    narrow = best_clip(Grid(bits, narrow=True), family, False)
    assert narrow == pytest.approx(NARROW[family][bits - 2], abs=6e-3)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("one_sided", [False, True])
def test_a_best_clip_is_a_minimum_on_samples(bits, one_sided):
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.abs() if one_sided else x
    grid, best = Grid(bits, symmetric=not one_sided), best_clip(Grid(bits, symmetric=not one_sided), "gauss", one_sided)

    def error(clip: float) -> float:
        high = tensor([clip], dtype=torch.float64)
        scale, zero = grid.scale_and_zero(torch.zeros_like(high) if one_sided else -high, high)
        point = grid.zero if zero is None else zero
        code = (x / scale + point).round().clamp(grid.low, grid.high)
        return float((((code - point) * scale) - x).square().mean())

    assert error(best) < min(error(0.9 * best), error(1.1 * best))


def test_bell_curves_take_spread_and_middle_from_the_data():
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * tensor([[1.0], [2.0], [0.5]])
    low, high = AciqGauss().range(x, Grid(4))
    torch.testing.assert_close(high, x.square().mean(dim=1).sqrt() * best_clip(Grid(4), "gauss", False))
    assert torch.equal(low, -high)
    low, high = AciqLaplace().range(x + 3, Grid(4, symmetric=False))
    middle = (x + 3).mean(dim=1)
    spread = (x + 3 - middle[:, None]).abs().mean(dim=1) * best_clip(Grid(4, symmetric=False), "laplace", False)
    torch.testing.assert_close(high, middle + spread)
    torch.testing.assert_close(low, middle - spread)
    low, high = AciqGauss().range(x.relu(), Grid(4, symmetric=False))
    assert low.tolist() == [0, 0, 0]
    spread = x.relu().square().sum(dim=1) / (x > 0).sum(dim=1)
    torch.testing.assert_close(high, spread.sqrt() * best_clip(Grid(4, symmetric=False), "gauss", True))


@pytest.mark.parametrize("share", [0.6, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_quantiles_are_numpys(n, share):
    rows = torch.randn(4, n, dtype=torch.float64)
    np.testing.assert_allclose(quantile(rows, share), np.quantile(rows.numpy(), share, axis=1), rtol=1e-12)


def test_percentiles():
    x = torch.arange(-1000.0, 1001.0).unsqueeze(0)
    low, high = Percentile(share=0.9).range(x, Grid(8))
    assert -low == high == pytest.approx(np.quantile(np.abs(x.numpy()), 0.9))
    low, high = Percentile(share=0.9).range(x + 500, Grid(8, symmetric=False))
    assert (float(low), float(high)) == pytest.approx((-300, 1300))
    outlier = torch.cat([torch.rand(1, 100_000), tensor([[1e3]])], dim=1)
    assert Percentile().range(outlier, Grid(8))[1] < 1.01


LONG = {
    "normal": lambda g: torch.randn(40_000, generator=g),
    "heavy": lambda g: torch.randn(40_000, generator=g) ** 9,
    "outlier": lambda g: torch.cat([torch.rand(39_999, generator=g), tensor([1e30])]),
    "ties": lambda g: torch.randint(-3, 4, (40_000,), generator=g).float(),
    "constant": lambda g: torch.full((40_000,), 2.5),
    "infinite": lambda g: torch.cat([torch.randn(39_999, generator=g), tensor([torch.inf])]),
    "narrow": lambda g: 1e6 + torch.randn(40_000, generator=g),
    "tiny": lambda g: torch.randn(40_000, generator=g) * 1e-42,
}


@pytest.mark.parametrize("kind", LONG)
def test_histograms_find_the_value_that_selection_finds(monkeypatch, kind):
    monkeypatch.setattr(percentile, "AT_ONCE", 4096)
    row = LONG[kind](torch.Generator().manual_seed(0))
    for k in (1, 2, 777, 20_000, 39_996, 39_999, 40_000):
        assert torch.equal(smallest_by_histogram(row, k), row.kthvalue(k).values)


def test_long_rows_have_the_quantiles_of_numpy(monkeypatch):
    """The way through histograms is taken, and ends where selection does."""
    rows = torch.randn(2, 30_000, generator=torch.Generator().manual_seed(1))
    want = quantile(rows, 0.9999)
    calls = []
    monkeypatch.setattr(percentile, "LARGE", 20_000)
    monkeypatch.setattr(percentile, "AT_ONCE", 4096)
    real = smallest_by_histogram
    monkeypatch.setattr(percentile, "smallest_by_histogram", lambda row, k: calls.append(k) or real(row, k))
    assert torch.equal(quantile(rows, 0.9999), want)
    assert len(calls) == 4  # two rows, two neighbours
    np.testing.assert_allclose(want, np.quantile(rows.numpy(), 0.9999, axis=1), rtol=1e-6)


def test_published_values():
    """A 99.9th percentile, and the divergence of eight bins, of which the last takes the tail, joined to four."""
    assert float(quantile(torch.arange(1.0, 1001.0)[None] / 1000, 0.999)) == pytest.approx(0.999001)
    counts = tensor([[10.0, 8, 6, 4, 3, 2, 1, 1, 5]])
    assert float(divergence(counts, 8, 4)) == pytest.approx(0.14556687, abs=1e-8)


def brute_force(counts: list[float], kept: int, levels: int) -> float:
    """In plain Python."""
    p = list(counts[:kept])
    p[-1] += sum(counts[kept:])
    q = [0.0] * kept
    for level in range(levels):
        bins = [j for j in range(kept) if j * levels // kept == level]
        filled = [j for j in bins if counts[j] > 0]
        for j in filled:
            q[j] = sum(counts[j] for j in bins) / len(filled)
    return stats.entropy(p, [max(v, 1e-12 * sum(q)) for v in q])


@pytest.mark.parametrize(("kept", "levels"), [(8, 4), (10, 4), (13, 4), (16, 16)])
def test_divergence_is_that_of_a_plain_loop(kept, levels):
    generator = torch.Generator().manual_seed(kept)
    counts = torch.randint(0, 9, (3, 16), generator=generator).double() + 1
    counts[:, 3] = 0
    for row, found in zip(counts.tolist(), divergence(counts, kept, levels).tolist(), strict=True):
        assert found == pytest.approx(brute_force(row, kept, levels), rel=1e-9, abs=1e-10)


def test_divergence_cuts_off_what_is_rare():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(1, 50_000, generator=generator), tensor([[60.0]])], dim=1)
    low, high = Kl().range(x, Grid(8))
    assert -low == high
    assert 2 < float(high) < 10
    low, high = Kl().range(x.abs(), Grid(8, symmetric=False))
    assert 0 <= float(low) < 0.1
    assert float(high) < 20


CLIPPING = ["minmax", "ema", "mse", "lp", "percentile", "kl", "aciq_gauss", "aciq_laplace"]


@pytest.mark.parametrize("inputs", ["static", "token"])
@pytest.mark.parametrize("weights", ["tensor", "channel", "g16"])
@pytest.mark.parametrize("name", CLIPPING)
def test_weights_and_inputs_take_them(name, weights, inputs):
    """Whatever shares a scale: a tensor, a channel, a group, or for inputs a token."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    attach(model, QuantConfig.parse("ste", f"w4a8-{weights}-{inputs}", observer=name))
    x = torch.randn(64, 64)
    if inputs == "static":
        calibrate(model, [x, x + 0.1])
    for layer in (model[0], model[2]):
        scales = {"tensor": 1, "channel": len(layer.weight), "g16": layer.weight.numel() // 16}[weights]
        assert layer.weight_quant.scale.numel() == scales
        assert (layer.weight_quant.scale > 0).all()
        assert (layer.weight - layer.on_grid()).square().mean() < 0.1 * layer.weight.square().mean()
    assert (model[0].input_quant(x) - x).square().mean() < 1e-3 * x.square().mean()
    if inputs == "token":  # every row has its own range
        big = torch.cat([x, 1e3 * x[:1]])
        assert torch.equal(model[0].input_quant(big)[:-1], model[0].input_quant(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Percentile(share=0.5), r"Percentile\.share: expected a number in \(0\.5, 1\], got 0\.5"),
        (lambda: Percentile(decay=1.0), r"Percentile\.decay: expected a number in \[0, 1\), got 1\.0"),
        (lambda: Kl(bins=1), r"Kl: expected two bins or more"),
        (lambda: AciqGauss(decay=math.nan), r"decay"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
