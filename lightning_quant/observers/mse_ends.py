"""Both ends of the range with the least squared rounding error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.grid import Grid
from lightning_quant.observers.mse import Mse


@dataclass(frozen=True)
class MseEnds(Mse):
    """``argmin over (l, u) of ||x - Q(x; l, u)||^2`` with levels evenly spaced from l to u, both real.

    The upper end is drawn in towards the lower one, then the lower one towards the upper, through ``candidates``
    shares each, and the best pair is improved by fitting a line to (code, x) and rounding again, ``fits`` times.
    Symmetric grids and codebooks have one free end: see ``mse``.

    Args:
        fits: Rounds of the second part.

    Source: Bhalgat et al., "LSQ+", CVPRW 2020, arXiv:2004.09576, asks for this minimum.
    Deviation: the search is ours and finds a local minimum.
    """

    candidates: int = 24
    fits: int = 12

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        if grid.zero is not None:
            return super().range(rows, grid)
        rows = rows.float()
        first, last, steps = rows.amin(dim=1), rows.amax(dim=1), grid.high - grid.low
        best = _Best(rows, first, last, steps)
        shares = [(1 - self.smallest) * i / max(self.candidates - 1, 1) for i in range(1, self.candidates)]
        for share in shares:
            best.offer(first, torch.lerp(last, first, share))
        high = best.high
        for share in shares:
            best.offer(torch.lerp(first, high, share), high)
        for _ in range(self.fits):
            low, high = best.fit()
            best.offer(torch.maximum(low, first), torch.minimum(high, last))
        return best.low, best.high


class _Best:
    """The best ends so far, row by row."""

    def __init__(self, rows: Tensor, low: Tensor, high: Tensor, steps: int) -> None:
        self.rows, self.steps = rows, steps
        self.low, self.high = low, high
        self.error = self._error(low, high)

    def offer(self, low: Tensor, high: Tensor) -> None:
        error = self._error(low, high)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Ends of the line through (code, x) with the least squares, for the codes of the best ends."""
        code = self._code(self.low, self.high)[0]
        x, c = self.rows - self.rows.mean(dim=1, keepdim=True), code - code.mean(dim=1, keepdim=True)
        scale = (x * c).sum(dim=1) / c.square().sum(dim=1).clamp(min=torch.finfo(c.dtype).tiny)
        low = self.rows.mean(dim=1) - scale * code.mean(dim=1)
        return low, low + scale * self.steps

    def _code(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = (high - low) / self.steps
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
        return ((self.rows - low[:, None]) / scale).round_().clamp_(0, self.steps), scale

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        code, scale = self._code(low, high)
        return code.mul_(scale).add_(low[:, None]).sub_(self.rows).square_().sum(dim=1)
