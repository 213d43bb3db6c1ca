"""Smallest and largest value ever seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer


@dataclass(frozen=True)
class MinMax(Observer):
    """``low = min x``, ``high = max x``; over steps the range only grows.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, arXiv:1712.05877, section 3.
    """

    covers: ClassVar[bool] = True

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        return rows.amin(dim=1), rows.amax(dim=1)
