"""The range with the least squared rounding error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.grid import Grid, decode, encode
from lightning_quant.observers.base import Observer

AT_ONCE = {"cpu": 2**18}  # numbers searched together: in the cache, and a large weight takes no copies of itself
ELSEWHERE = 2**24


@dataclass(frozen=True)
class Mse(Observer):
    """``argmin over c of sum |x - Q(x; c * range)|^power`` on a grid of shrink factors c.

    Args:
        candidates: How many factors are tried.
        smallest: The smallest factor; the largest is 1.
        power: 2 is the squared error; more keeps the range wider.

    Source: the search over clipping factors is common practice; see Choukroun et al., arXiv:1902.06822.
    """

    pool: ClassVar[float] = 1.0

    candidates: int = 48
    smallest: float = 0.2
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.candidates < 1 or not 0 < self.smallest <= 1 or self.power <= 0:
            got = (self.candidates, self.smallest, self.power)
            expected = "candidates >= 1 and 0 < smallest <= 1, and power > 0"
            raise ValueError(explain("Mse", expected, got, "Use 48, 0.2, 2."))

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        at_once = max(AT_ONCE.get(rows.device.type, ELSEWHERE) // max(rows.shape[1], 1), 1)
        if len(rows) > at_once:
            parts: tuple[Tensor, ...] = rows.split(at_once)  # type: ignore[no-untyped-call]
            ends = [self.range(part, grid) for part in parts]
            return torch.cat([low for low, _ in ends]), torch.cat([high for _, high in ends])
        rows = rows.float()
        low, high = rows.amin(dim=1), rows.amax(dim=1)
        table = grid.table()
        table = None if table is None else table.to(rows.device)
        best = torch.full_like(low, torch.inf)
        best_low, best_high = low.clone(), high.clone()
        for i in range(self.candidates):
            factor = 1 - (1 - self.smallest) * i / max(self.candidates - 1, 1)
            scale, zero = grid.scale_and_zero(low * factor, high * factor)
            point = grid.zero or 0.0 if zero is None else zero[:, None]
            if table is None:
                code = encode(rows, scale[:, None], point, grid.low, grid.high)
            else:
                code = grid.round(rows / scale[:, None], table)
            apart = decode(code, scale[:, None], point).sub_(rows)
            error = (apart.square_() if self.power == 2 else apart.abs_().pow_(self.power)).sum(dim=1)
            better = error < best
            best = torch.where(better, error, best)
            best_low = torch.where(better, low * factor, best_low)
            best_high = torch.where(better, high * factor, best_high)
        return best_low, best_high

    def merge(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Average over steps, with the weight of an exponential average of decay 0.9."""
        return torch.lerp(new[0], old[0], 0.9), torch.lerp(new[1], old[1], 0.9)
