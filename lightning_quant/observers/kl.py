"""The clip whose rounded histogram tells least apart from the data's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.grid import Grid
from lightning_quant.observers.base import Observer

CANDIDATES = 128  # clips that are tried, evenly spaced


def divergence(counts: Tensor, kept: int, levels: int) -> Tensor:
    """``KL(P || Q)`` of each row's histogram clipped after ``kept`` bins and rounded to ``levels`` levels.

    P is the first bins with the mass beyond them in the last one; Q is the same bins without that mass, joined to
    levels and spread again over those of their bins that are not empty.

    Args:
        counts: (rows, bins), not negative.
        kept: Bins that stay.
        levels: How many there are for them.

    >>> row = torch.tensor([[10.0, 8, 6, 4, 3, 2, 1, 1, 5]])
    >>> round(float(divergence(row, 8, 4)), 8)
    0.14556687
    """
    raw = counts[:, :kept].double()
    p = raw.clone()
    p[:, -1] += counts[:, kept:].double().sum(dim=1)
    place = (torch.arange(kept, device=counts.device) * levels // kept).expand_as(raw)
    filled = (raw > 0).double()
    zeros = raw.new_zeros(len(raw), levels)
    mass = zeros.scatter_add(1, place, raw).gather(1, place)
    bins = zeros.scatter_add(1, place, filled).gather(1, place)
    q = torch.where(filled > 0, mass / bins.clamp(min=1), 0.0)
    p, q = p / p.sum(dim=1, keepdim=True).clamp(min=1e-30), q / q.sum(dim=1, keepdim=True).clamp(min=1e-30)
    smallest = 1e-12  # a level without mass where the clipped values lie
    return torch.where(p > 0, p * (p.clamp(min=smallest) / q.clamp(min=smallest)).log(), 0.0).sum(dim=1)


@dataclass(frozen=True)
class Kl(Observer):
    """The clip of ``|x|`` with the least divergence between the histograms before and after rounding.

    Args:
        bins: Of the histogram of ``|x|``, over each row's own largest value.
        decay: In [0, 1): of the average over steps.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017.
    Deviation: 128 evenly spaced clips are tried instead of all; levels are those of one sign (of all codes where the
    data have one sign and the grid a zero point).
    """

    pool: ClassVar[float] = 1.0

    bins: int = 2048
    decay: float = 0.9

    def __post_init__(self) -> None:
        if self.bins < 2 or not 0 <= self.decay < 1:
            got = (self.bins, self.decay)
            raise ValueError(explain("Kl", "two bins or more and a decay in [0, 1)", got, "Use 2048, 0.9."))

    def range(self, rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """See the class."""
        size = rows.float().abs()
        top = size.amax(dim=1)
        one_sided = grid.zero is None and bool((rows >= 0).all())
        codes = grid.high - grid.low + 1
        levels = max(codes if one_sided else codes // 2, 1)
        place = (size / top.clamp(min=1e-30)[:, None] * self.bins).long().clamp_(max=self.bins - 1)
        counts = size.new_zeros(len(size), self.bins).scatter_add_(1, place, (size > 0).to(size))
        best = torch.full_like(top, torch.inf, dtype=torch.float64)
        clip = top.clone()
        first = min(levels, self.bins)
        for kept in {self.bins - (self.bins - first) * i // CANDIDATES: None for i in range(CANDIDATES + 1)}:
            found = divergence(counts, kept, min(levels, kept))
            better = found < best
            best = torch.where(better, found, best)
            clip = torch.where(better, top * kept / self.bins, clip)
        if grid.zero is not None:
            return -clip, clip
        return torch.maximum(rows.amin(dim=1).float(), -clip), torch.minimum(rows.amax(dim=1).float(), clip)

    def merge(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Average over steps."""
        return torch.lerp(new[0], old[0], self.decay), torch.lerp(new[1], old[1], self.decay)
