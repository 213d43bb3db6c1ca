"""The contract of range observers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.grid import Grid


@dataclass(frozen=True)
class Observer(ABC):
    """Reads ranges off data.  Rows of the input share one scale.

    Class attributes: ``covers``, whether no value of the data lies outside the range; ``data_free``, whether the
    range is known without any data (``range`` then takes rows without elements too); ``pool``, the exponent of
    the power mean that joins the ranges of the micro-batches and ranks of one optimizer step (infinite: the widest).
    """

    covers: ClassVar[bool] = False
    data_free: ClassVar[bool] = False
    pool: ClassVar[float] = math.inf

    @abstractmethod
    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Ends of the range this data wants.

        Args:
            rows: Data, real, (scales, elements).
            grid: The codes that will cover the range.

        Returns:
            (low, high), each (scales,), real.
        """

    def merge(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The range after one more optimizer step's data."""
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])

    def weight(self, rows: Tensor) -> Tensor:
        """How many values a range speaks for, (1,): its weight in a power mean."""
        return rows.new_full((1,), rows.shape[1])

    def pooled(self, old: Tensor | None, rows: Tensor, grid: Grid) -> Tensor:
        """What the step's forwards note, with one more: (3,), added up, or the largest of each.

        Args:
            old: What was noted before; None: nothing.
            rows: One row of data, real, (1, elements).
            grid: See ``range``.
        """
        low, high = self.range(rows, grid)
        if math.isinf(self.pool):
            new = torch.cat([-low, high, torch.ones_like(low)])
            return new if old is None else torch.maximum(old, new)
        new = torch.cat([_signed_power(low, self.pool), _signed_power(high, self.pool), torch.ones_like(low)])
        new *= self.weight(rows).to(new)
        return new if old is None else old + new

    def unpooled(self, noted: Tensor) -> tuple[Tensor, Tensor]:
        """The range that notes amount to, each end (1,)."""
        low, high, count = noted[:1], noted[1:2], noted[2:]
        if math.isinf(self.pool):
            return -low, high
        count = count.clamp(min=1)
        return _signed_power(low / count, 1 / self.pool), _signed_power(high / count, 1 / self.pool)


def _signed_power(x: Tensor, exponent: float) -> Tensor:
    return x if exponent == 1 else x.abs().pow(exponent).copysign(x)
