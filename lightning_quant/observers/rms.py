"""The range at which the scale is the data's root mean square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.ema import Ema


@dataclass(frozen=True)
class Rms(Ema):
    """``+-sigma * (largest code)``, sigma the root mean square of the values that are not 0: ``scale = sigma``.

    For methods whose levels are those of a distribution of variance 1.  Values that a ReLU made 0 do not count.

    Args:
        decay: In [0, 1): that of ``ema``.
    """

    pool: ClassVar[float] = 2.0
    covers: ClassVar[bool] = False

    def weight(self, rows: Tensor) -> Tensor:
        """The values the root mean square is taken of."""
        return (rows != 0).sum(dim=1)

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        sigma = (wide.square().sum(dim=1) / (wide != 0).sum(dim=1).clamp(min=1)).sqrt()
        return -sigma * grid.top, sigma * grid.top
