"""A range that is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer


@dataclass(frozen=True)
class Unit(Observer):
    """(-1, 1) on a grid whose zero point is fixed, (0, 1) on any other, whatever the data.

    Source: the ranges of DoReFa-Net's weights and inputs, Zhou et al., arXiv:1606.06160, section 2.
    """

    data_free: ClassVar[bool] = True

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        low = 0.0 if grid.zero is None else -1.0
        return rows.new_full((len(rows),), low), rows.new_full((len(rows),), 1.0)
