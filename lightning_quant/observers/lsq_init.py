"""The range LSQ starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer


@dataclass(frozen=True)
class LsqInit(Observer):
    """``s = 2 mean|x| / sqrt(Q_P)``, with Q_P the highest code.

    Q_P is 2^(b-1) - 1 on symmetric grids and 2^b - 1 on others, whose lowest level lies at the smallest value
    (at 0 if none is negative); it is at least 1, and the largest level on a codebook.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, section 2.1.
    Deviation: over several steps ranges are averaged with decay 0.9; the paper reads the first batch.
    """

    pool: ClassVar[float] = 1.0

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        mean = 2 * rows.abs().mean(dim=1)
        if grid.zero is None:
            low = rows.amin(dim=1).clamp(max=0)
            return low, low + mean * math.sqrt(grid.high - grid.low)
        last = grid.top if grid.levels is not None else float(grid.high)
        top = mean * (grid.top / math.sqrt(max(last, 1.0)))
        return -top, top

    def merge(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See the class."""
        return torch.lerp(new[0], old[0], 0.9), torch.lerp(new[1], old[1], 0.9)
