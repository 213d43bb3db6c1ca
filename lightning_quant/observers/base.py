"""The contract of range observers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observer(ABC):
    """Reads ranges off data.  Rows of the input share one scale."""

    @abstractmethod
    def range(self, rows: Tensor, bits: float, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Ends of the range this data wants.

        Args:
            rows: Data, real, (scales, elements).
            bits: Width of a code.
            symmetric: Whether the grid is symmetric.

        Returns:
            (low, high), each (scales,), real.
        """

    def merge(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The range after one more optimizer step's data."""
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])
