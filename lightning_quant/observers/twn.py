"""The scale of ternary weight networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer

THRESHOLD = 0.7


@dataclass(frozen=True)
class Twn(Observer):
    """``+-alpha``, the mean of |w| over the weights with |w| > 0.7 E|w|.

    Source: Li, Zhang, Liu, "Ternary Weight Networks", 2016, arXiv:1605.04711.
    """

    pool: ClassVar[float] = 1.0

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        size = rows.abs().to(torch.promote_types(rows.dtype, torch.float32))
        kept = size > THRESHOLD * size.mean(dim=1, keepdim=True)
        alpha = (size * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        return -alpha, alpha
