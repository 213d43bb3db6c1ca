"""The mean magnitude as the range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.ema import Ema

SMALLEST = 1e-7


@dataclass(frozen=True)
class AbsMean(Ema):
    """``+-mean |x|``, which is where the two levels +-alpha have the least squared error; averaged over steps.

    At least 1e-7, so that zeros stay near 0 on a grid that has no level there.

    Args:
        decay: In [0, 1): that of ``ema``; only static activations have more than one step.

    Source: Rastegari et al., "XNOR-Net", ECCV 2016, arXiv:1603.05279, section 3.1.
    """

    pool: ClassVar[float] = 1.0
    covers: ClassVar[bool] = False

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        alpha = rows.abs().mean(dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)).clamp(min=SMALLEST)
        return -alpha, alpha
