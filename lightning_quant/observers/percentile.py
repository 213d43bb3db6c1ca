"""A range that leaves a share of outliers out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer


def quantile(rows: Tensor, share: float) -> Tensor:
    """The value below which this share of each row lies, linearly interpolated, exact for rows of any length.

    >>> round(float(quantile(torch.arange(1.0, 1001.0).unsqueeze(0) / 1000, 0.999)), 6)
    0.999001
    """
    place = share * (rows.shape[1] - 1)
    below = math.floor(place)
    low = rows.kthvalue(below + 1, dim=1).values
    if place == below:
        return low
    return torch.lerp(low, rows.kthvalue(below + 2, dim=1).values, place - below)


@dataclass(frozen=True)
class Percentile(Observer):
    """The ``share`` quantile of ``|x|``; on an asymmetric grid those of x at both ends.

    Args:
        share: In (0.5, 1].
        decay: In [0, 1): of the average over steps.

    Source: common practice, e.g. McKinstry et al. 2018, arXiv:1809.04191, section 3.2.
    """

    pool: ClassVar[float] = 1.0

    share: float = 0.9999
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0.5 < self.share <= 1:
            raise ValueError(explain("Percentile.share", "a number in (0.5, 1]", self.share, "Use 0.9999."))
        if not 0 <= self.decay < 1:
            raise ValueError(explain("Percentile.decay", "a number in [0, 1)", self.decay, "Use 0.9."))

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        rows = rows.float()
        if grid.zero is None:
            return -quantile(-rows, self.share), quantile(rows, self.share)
        high = quantile(rows.abs(), self.share)
        return -high, high

    def merge(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Average over steps."""
        return torch.lerp(new[0], old[0], self.decay), torch.lerp(new[1], old[1], self.decay)
