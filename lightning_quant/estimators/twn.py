"""Ternary weight networks: small weights are 0, the others keep their sign and the mean of their magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_quant.estimators.base import About, Estimator, demand
from lightning_quant.estimators.ste import Ste
from lightning_quant.grid import Grid
from lightning_quant.observers.twn import THRESHOLD
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Twn(Estimator):
    """Ternary weights by a threshold on the magnitude; inputs are those of ``ste``.

    See the class of weights for the formula.

    Source: Li, Zhang, Liu, "Ternary Weight Networks", 2016, arXiv:1605.04711.
    Deviation: one threshold and alpha per output channel unless ``granularity="tensor"``, the paper's, is set.
    """

    about: ClassVar[About] = About("Li, Zhang, Liu 2016", "1605.04711", "1.58", "nothing", "w1.58")

    def role(self, is_weight: bool) -> Estimator:
        """Only weights are ternary."""
        return TwnWeights() if is_weight else Ste()


@dataclass(frozen=True)
class TwnWeights(Estimator):
    """Weights: ``y = alpha sgn(w) 1[|w| > Delta]``, Delta = 0.7 E|w|, alpha the mean of |w| over |w| > Delta.

    Both are taken anew at every call.  ``g_w = g`` everywhere.
    """

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Ternary, with a scale that follows the weights."""
        needs = {"symmetric": True, "dynamic": True, "grid": "int", "range": "scale", "learn_scale": False}
        kinds = ("channel", "tensor", "group")
        return demand(spec, where, "twn", bits=1.58, granularity=kinds, observer="twn", **needs)

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Delta in units of alpha, for each alpha."""
        return (ternary_threshold(x, scale),)

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """The sign of what lies beyond the threshold."""
        return ternary(u, inputs[0])

    def edges(self, grid: Grid) -> tuple[float, float]:
        """Gradients pass everywhere."""
        return (-math.inf, math.inf)


def ternary_threshold(x: Tensor, scale: Tensor) -> Tensor:
    """0.7 E|x| over what shares a scale, in units of it; of the scale's shape."""
    size = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))
    return size.sum_to_size(scale.shape) * (THRESHOLD * scale.numel() / max(x.numel(), 1)) / scale.detach()


def ternary(u: Tensor, threshold: Tensor) -> Tensor:
    """-1, 0 or 1: the sign where |u| > threshold."""
    return torch.where(u.abs() > threshold, u.sign(), 0.0)
