"""Inputs are rounded down: a network trained on coarse features is harder to disturb."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_quant.estimators.base import About, Estimator, demand
from lightning_quant.estimators.ste import Ste
from lightning_quant.grid import Grid
from lightning_quant.scheme import TensorSpec


@dataclass(frozen=True)
class Floor(Estimator):
    """Feature quantization by rounding down, for robustness.

    Inputs: ``y = floor(beta * x) / beta``, beta = 1 / scale, straight-through over ``[low, high + 1)`` in code units,
    which is what the codes reach.  Weights: the straight-through estimator.

    Source: Sun et al., "Feature Quantization for Defending Against Distortion of Images", CVPR 2018.
    Deviation: the paper's codes are unbounded and its beta is a number per channel; ours are clamped to the scheme's
    width, with one beta per layer, from the observed range.
    """

    about: ClassVar[About] = About("Sun et al. 2018", "", "1-8", "nothing", "w8a8-static")

    def role(self, is_weight: bool) -> Estimator:
        """Weights are rounded to the nearest level."""
        return Ste() if is_weight else self

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """A fixed beta: a range that ends on each call's largest value would lose that value's level to rounding."""
        return demand(spec, where, "floor", dynamic=False)

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """The code below."""
        return u.floor_().clamp_(grid.low, grid.high)

    def edges(self, grid: Grid) -> tuple[float, float]:
        """Up to where rounding down still ends on the last code."""
        return float(grid.low), grid.high + 1.0
