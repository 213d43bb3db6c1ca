"""Analytic clipping: the best range for a bell curve with the data's spread."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.ema import Ema

WIDTH, POINTS = 30.0, 60001  # of the integral, in spreads


@lru_cache(maxsize=256)
def best_clip(grid: Grid, family: str, one_sided: bool) -> float:
    """The end of the range with the least expected squared error, for data of spread 1.

    The error is that of the grid itself (its outermost codes, a level at 0 or none), not of evenly many bins.

    Args:
        grid: The codes.
        family: ``gauss`` (spread: the standard deviation) or ``laplace`` (the mean magnitude).
        one_sided: Only values from 0 on, as after a ReLU.

    >>> round(best_clip(Grid(4), "gauss", False) * 8 / 7, 2)  # of 2^(M-1) steps: 2.709
    2.71
    """
    x = torch.linspace(0.0 if one_sided else -WIDTH, WIDTH, POINTS, dtype=torch.float64)
    density = (-x.square() / 2).exp() if family == "gauss" else (-x.abs()).exp()
    table = grid.table()

    def error(clip: float) -> float:
        high = torch.tensor([clip], dtype=torch.float64)
        scale, zero = grid.scale_and_zero(torch.zeros_like(high) if one_sided else -high, high)
        point = (grid.zero or 0.0) if zero is None else zero
        u = x / scale + point
        code = u.round().clamp(grid.low, grid.high) if table is None else grid.round(u, table)
        return float(((((code - point) * scale) - x).square() * density).sum())

    low, high = 0.1, 15.0
    for _ in range(3):  # finer and finer
        step = (high - low) / 100
        best = min((low + step * i for i in range(101)), key=error)
        low, high = max(best - step, 1e-3), best + step
    return best


@dataclass(frozen=True)
class AciqGauss(Ema):
    """``mean +- c sigma``, c the best clip of a normal distribution on this grid (mean 0 on symmetric grids).

    Args:
        decay: In [0, 1): that of ``ema``.

    Source: Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
    NeurIPS 2019, arXiv:1810.05723.
    Deviation: the clip is found for the grid's own levels by numerical integration; the paper's formula is that of
    2^M bins with levels in their middles.
    """

    covers: ClassVar[bool] = False
    pool: ClassVar[float] = 2.0
    family: ClassVar[str] = "gauss"

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if grid.zero is None and bool((rows >= 0).all()):
            spread = self.spread(rows, (rows > 0).sum(dim=1))
            return torch.zeros_like(spread), spread * best_clip(grid, self.family, True)
        middle = rows.mean(dim=1) if grid.zero is None else rows.new_zeros(len(rows))
        spread = self.spread(rows - middle[:, None], torch.full_like(middle, rows.shape[1]))
        clip = spread * best_clip(grid, self.family, False)
        return middle - clip, middle + clip

    def spread(self, rows: Tensor, count: Tensor) -> Tensor:
        """Standard deviation around 0 of each row's ``count`` values that are not 0 by clipping."""
        return (rows.square().sum(dim=1) / count.clamp(min=1)).sqrt()


@dataclass(frozen=True)
class AciqLaplace(AciqGauss):
    """As ``aciq_gauss`` for a Laplace distribution: ``mean +- c b``, b the mean magnitude.

    Args:
        decay: In [0, 1): that of ``ema``.

    Source: as ``aciq_gauss``.
    """

    pool: ClassVar[float] = 1.0
    family: ClassVar[str] = "laplace"

    def spread(self, rows: Tensor, count: Tensor) -> Tensor:
        """Mean magnitude of each row's ``count`` values."""
        return rows.abs().sum(dim=1) / count.clamp(min=1)
