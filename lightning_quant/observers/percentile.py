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

LARGE = 2**22  # numbers in a row that a selection would copy, with an index of twice their size for each
BINS, AT_ONCE = 4096, 2**22  # a histogram counts in float32, which is exact up to 2^24


def quantile(rows: Tensor, share: float) -> Tensor:
    """The value below which this share of each row lies, linearly interpolated, exact for rows of any length.

    >>> round(float(quantile(torch.arange(1.0, 1001.0).unsqueeze(0) / 1000, 0.999)), 6)
    0.999001
    """
    place = share * (rows.shape[1] - 1)
    below = math.floor(place)
    low = _smallest(rows, below + 1)
    if place == below:
        return low
    return torch.lerp(low, _smallest(rows, below + 2), place - below)


def _smallest(rows: Tensor, k: int) -> Tensor:
    """The k-th smallest value of each row, counted from 1: by selection, in long rows by histograms."""
    if rows.shape[1] <= LARGE or torch.compiler.is_compiling():  # what follows reads numbers off the device
        return rows.kthvalue(k, dim=1).values
    return torch.stack([smallest_by_histogram(row, k) for row in rows])


def smallest_by_histogram(row: Tensor, k: int) -> Tensor:
    """The k-th smallest value of (n,), counted from 1, exactly.

    The bin that holds it is found from counts, and what lies in it looked at again, until few values are left; needs
    little memory beside the row.
    """
    while len(row) > AT_ONCE // 64:
        low, high = row.amin(), row.amax()
        ends = float(low), float(high)
        width = (ends[1] - ends[0]) / BINS
        if not math.isfinite(width) or bool((low + width == low) | (high - width == high)):
            break  # bins as narrow as neighbouring numbers
        counts = torch.stack([torch.histc(part, BINS, *ends).double() for part in _parts(row)]).sum(dim=0)
        place = int((counts.cumsum(0) < k).sum())
        first, last = ends[0] + (place - 1) * width, ends[0] + (place + 2) * width  # one more on either side: rounding
        k -= sum(int((part < first).sum()) for part in _parts(row))
        row = torch.cat([part[(part >= first) & (part <= last)] for part in _parts(row)])
    return row.kthvalue(k).values


def _parts(row: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = row.split(AT_ONCE)  # type: ignore[no-untyped-call]
    return parts


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
