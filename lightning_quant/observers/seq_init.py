"""The range ParetoQ starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer


@dataclass(frozen=True)
class SeqInit(Observer):
    """Outermost level: mean|w| at 1 bit, 2/3 max|w| at 1.58, 3/4 max|w| at 2 bits, max|w| above.

    These are the levels of ``alpha = max|w|`` (at 1 bit mean|w|), the range of the stretched grid.

    Source: Liu et al., "ParetoQ", arXiv:2502.02631.
    """

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        low, high = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
        top = rows.abs().mean(dim=1) if grid.bits == 1 else torch.maximum(-low, high) * share(grid.bits)
        return torch.maximum(low, -top), torch.minimum(high, top)


def share(bits: float) -> float:
    """Outermost level in units of alpha.

    >>> [round(share(b), 3) for b in (1, 1.58, 2, 4)]
    [1.0, 0.667, 0.75, 1.0]
    """
    return {1.58: 2 / 3, 2: 3 / 4}.get(bits, 1.0)
