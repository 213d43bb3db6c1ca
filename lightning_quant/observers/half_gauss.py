"""The uniform grid with the least squared error on the positive half of a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer
from lightning_quant.observers.ema import Ema

# Distance of the levels {q, 2q, ...} for 1 to 8 bits and variance 1; a test computes them again.
STEPS = (0.79788456, 0.53881192, 0.32172891, 0.18424334, 0.10298401, 0.05658434, 0.03069137, 0.01648178)


def largest_level(grid: Grid) -> float:
    """``(2^b - 1) q``, the largest level for variance 1."""
    return STEPS[int(grid.bits) - 1] * (grid.high - grid.low)


@dataclass(frozen=True)
class HalfGauss(Ema):
    """``(0, (2^b - 1) q sigma)``, q the best step for variance 1, sigma the rms of the positive values.

    Args:
        decay: In [0, 1): that of ``ema``.

    Source: Cai et al., "Deep Learning with Low Precision by Half-wave Gaussian Quantization", CVPR 2017,
    arXiv:1702.00953, section 4.1.
    Deviation: the paper takes sigma = 1 from batch normalization (``half_gauss_unit``).  Positive values alone are
    looked at, so that sigma is the same before and after a ReLU.
    """

    pool: ClassVar[float] = 2.0
    covers: ClassVar[bool] = False

    def weight(self, rows: Tensor) -> Tensor:
        """The values the root mean square is taken of."""
        return (rows > 0).sum(dim=1)

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        positive = rows.clamp(min=0).to(torch.promote_types(rows.dtype, torch.float32))
        sigma = (positive.square().sum(dim=1) / (positive > 0).sum(dim=1).clamp(min=1)).sqrt()
        return torch.zeros_like(sigma), sigma * largest_level(grid)


@dataclass(frozen=True)
class HalfGaussUnit(Observer):
    """``(0, (2^b - 1) q)``: as ``half_gauss`` for inputs of variance 1, whatever the data.

    Source: as ``half_gauss``.
    """

    data_free: ClassVar[bool] = True

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        return rows.new_zeros(len(rows)), rows.new_full((len(rows),), largest_level(grid))
