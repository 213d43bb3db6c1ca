"""The range that a batch normalization's own parameters promise, without any data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer

SIGMAS = 6.0


def promised(beta: Tensor, gamma: Tensor) -> tuple[float, float]:
    """``(min(beta - 6 |gamma|), max(beta + 6 |gamma|))`` over channels: where normalized values lie.

    >>> import torch
    >>> promised(torch.tensor([0.0, 1.0]), torch.tensor([0.5, -1.0]))
    (-5.0, 7.0)
    """
    reach = SIGMAS * gamma.abs()
    return float((beta - reach).min()), float((beta + reach).max())


@dataclass(frozen=True)
class BnStats(Observer):
    """``(min(beta - 6 gamma), max(beta + 6 gamma))`` of the batch normalization before a layer, for its static input.

    What lies between is followed: a ReLU cuts the range off, an addition adds ranges up, a pooling keeps them.  Inputs
    that no batch normalization bounds (an image) are observed as by ``ema``, and the report says which.

    Args:
        low: The lower end, which ``attach`` finds, real.
        high: The upper one.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
    arXiv:1906.04721, section 5 (ranges of n = 6 standard deviations).
    Deviation: ranges of added tensors are added, which is wider than what their sum reaches.
    """

    data_free: ClassVar[bool] = True

    low: float | None = None
    high: float | None = None

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        if self.low is None or self.high is None:
            cure = "Use it for the activations of a model that attach() is given."
            raise ValueError(explain("BnStats", "ends, which attach reads off a batch normalization", "none", cure))
        return rows.new_full((len(rows),), self.low), rows.new_full((len(rows),), self.high)
