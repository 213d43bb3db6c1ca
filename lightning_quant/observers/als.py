"""The scale with the least squared error, by alternating between codes and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer
from lightning_quant.observers.mse import Mse

FIXED = 2**30
SMALLEST = 0.1


@dataclass(frozen=True)
class Als(Observer):
    """``min ||x - alpha * t||^2`` over scales alpha and codes t, by turns; exact where t is in {-1, 0, 1}.

    ``t = Q(x / alpha)`` and ``alpha = <x, t> / <t, t>``, from the best of several starts.  For ternary codes the k
    largest magnitudes that maximise ``(their sum)^2 / k`` get a code, and alpha is their mean.

    Args:
        starts: How many first scales are tried, spread geometrically over [0.1, 1] of the largest magnitude.
        rounds: Turns after that.

    Source: step two of Wang et al., "Two-Step Quantization for Low-bit Neural Networks", CVPR 2018; the ternary
    optimum is that of Li, Zhang, Liu, arXiv:1605.04711, section 2.2, found by sorting.
    Deviation: asymmetric grids get the search of ``mse``.
    """

    pool: ClassVar[float] = 1.0

    starts: int = 16
    rounds: int = 2

    def __post_init__(self) -> None:
        if self.starts < 1 or self.rounds < 0:
            raise ValueError(explain("Als", "starts >= 1 and rounds >= 0", (self.starts, self.rounds), "Use 16, 2."))

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        if grid.zero is None:
            return Mse().range(rows, grid)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        ternary = grid.levels is None and grid.zero == 0 and (grid.low, grid.high) == (-1, 1)
        top = (_ternary(rows) if ternary else self._alternate(rows, grid)) * grid.top
        return -top, top

    def _alternate(self, rows: Tensor, grid: Grid) -> Tensor:
        table = grid.table()
        table = None if table is None else table.to(rows.device)
        largest = rows.abs().amax(dim=1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        best = alpha = torch.zeros_like(largest)
        for i in range(self.starts):
            factor = SMALLEST ** (i / max(self.starts - 1, 1))
            found, gain = _fit(rows, largest * (factor / grid.top), grid, table)
            alpha, best = torch.where(gain > best, found, alpha), torch.maximum(gain, best)
        for _ in range(self.rounds):
            alpha, _ = _fit(rows, torch.where(alpha > 0, alpha, 1.0), grid, table)
        return alpha.squeeze(1)


def _fit(rows: Tensor, alpha: Tensor, grid: Grid, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """The best scale for the codes that ``alpha`` gives, and how much squared error it saves; both (rows, 1)."""
    u, zero = rows / alpha, grid.zero or 0.0
    t = (u + zero).round_().clamp_(grid.low, grid.high).sub_(zero) if table is None else grid.round(u, table)
    common, own = (rows * t).sum(dim=1, keepdim=True), t.square().sum(dim=1, keepdim=True).clamp_(min=1e-30)
    return common / own, common.square() / own


def _ternary(rows: Tensor) -> Tensor:
    """Exact scales: means of the k largest magnitudes of each row."""
    size = rows.abs()
    largest = size.amax(dim=1, keepdim=True)
    # Sums of integers are the same on every device and in every order; a cumulative sum of floats is not.
    units = (size / torch.where(largest > 0, largest, 1.0)).double().mul_(FIXED).round_().nan_to_num_(0.0).long()
    total = units.sort(dim=1, descending=True).values.cumsum(dim=1).double()
    k = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    at = (total.square() / k).argmax(dim=1, keepdim=True)
    mean = (total.gather(1, at) / (at + 1)).div_(FIXED)
    return mean.to(rows.dtype).mul_(largest).squeeze(1)
