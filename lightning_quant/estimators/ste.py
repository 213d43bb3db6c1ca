"""Straight-through: the rounding is the identity in the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.errors import unknown
from lightning_quant.estimators.base import About, Estimator
from lightning_quant.grid import Grid

MASKS = ("clamp", "round", "none")


@dataclass(frozen=True)
class Ste(Estimator):
    """Straight-through estimator (STE), clipped to the range.

    ``g_x = g`` where u = x/scale + zero lies on the range, else 0.

    Args:
        mask: Where the range ends: ``clamp`` (clamp, then round) at the outermost levels; ``round`` (round, then
            clamp: the mask of torch's fake_quantize) half a step beyond them; ``none``: nowhere, the plain form.

    Source: Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
    arXiv:1308.3432; the clipped form as in Courbariaux et al., arXiv:1602.02830.
    Deviation: under ``round`` a value exactly half a step beyond passes at both ends; torch follows its rounding
    half to even there.
    """

    mask: str = "clamp"
    about: ClassVar[About] = About("Bengio et al. 2013", "1308.3432", "1-8", "nothing")

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(unknown("mask", self.mask, MASKS, "ste.mask"))

    def edges(self, grid: Grid) -> tuple[float, float] | None:
        """See ``mask``; on a codebook half a step is half of the outermost gap."""
        if self.mask == "clamp":
            return None
        if self.mask == "none":
            return -math.inf, math.inf
        low, high = grid.span()
        levels = grid.levels or (0.0, 1.0)
        return low - (levels[1] - levels[0]) / 2, high + (levels[-1] - levels[-2]) / 2
