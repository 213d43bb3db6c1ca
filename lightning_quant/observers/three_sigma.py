"""Three standard deviations around the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_quant.grid import Grid, code_bounds
from lightning_quant.observers.base import Observer


@dataclass(frozen=True)
class ThreeSigma(Observer):
    """Symmetric grids: ``s = max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1)``; others cover mean -+ 3 std.

    The standard deviation is the population's (divided by the number of elements).

    Source: Bhalgat et al., "LSQ+", CVPRW 2020, arXiv:2004.09576 (initial scale of the weights).
    """

    pool: ClassVar[float] = 1.0

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        mean, reach = rows.mean(dim=1), 3 * rows.std(dim=1, correction=0)
        if grid.zero is None:
            return mean - reach, mean + reach
        top = mean.abs() + reach
        if grid.levels is None:
            top = top * (grid.top / -code_bounds(grid.bits)[0])
        return -top, top
