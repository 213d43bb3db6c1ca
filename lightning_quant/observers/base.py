"""The contract of range observers."""

from __future__ import annotations

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
    range is known without any data (``range`` then takes rows without elements too).
    """

    covers: ClassVar[bool] = False
    data_free: ClassVar[bool] = False

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
