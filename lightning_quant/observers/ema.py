"""Smoothed smallest and largest value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.observers.minmax import MinMax


@dataclass(frozen=True)
class Ema(MinMax):
    """``range <- decay * range + (1 - decay) * (min x, max x)``, once per optimizer step.

    Args:
        decay: In [0, 1).

    Source: Jacob et al., arXiv:1712.05877, section 3.1.
    Deviation: micro-batches and ranks of one step are merged by min and max before the average, so that
    neither gradient accumulation nor the number of processes changes the result.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(explain("Ema.decay", "a number in [0, 1)", self.decay, "Use 0.9."))

    def merge(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """See the class."""
        return torch.lerp(new[0], old[0], self.decay), torch.lerp(new[1], old[1], self.decay)
