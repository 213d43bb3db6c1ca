"""SYQ: binary or ternary weights with a learned scale per pixel of the kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand
from lightning_quant.estimators.ste import Ste
from lightning_quant.estimators.twn import ternary
from lightning_quant.grid import Grid
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Syq(Estimator):
    """Binary or ternary weights, each pixel of the kernel with a learned scale; inputs are those of ``ste``.

    See the class of weights for the formula.

    Args:
        eta: Threshold of ternary weights as a share of the layer's largest magnitude, in [0, 1).

    Source: Faraone et al., "SYQ: Learning Symmetric Quantization For Efficient Deep Neural Networks", CVPR 2018.
    Deviation: linear layers have one scale per output channel instead of one in all (``granularity="tensor"`` has
    one).  The gradient of w is passed on as it is; the authors' code multiplies it by alpha beyond the threshold.
    Inputs are not restricted to steps of a power of two.
    """

    about: ClassVar[About] = About("Faraone et al. 2018", "", "1, 1.58", "scale", "w1.58")
    eta: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.eta < 1:
            raise ValueError(explain("syq.eta", "a number in [0, 1)", self.eta, "The authors use 0.05."))

    def role(self, is_weight: bool) -> Estimator:
        """Only weights are binary or ternary."""
        return SyqWeights(self.eta) if is_weight else Ste()


@dataclass(frozen=True)
class SyqWeights(Estimator):
    """Weights: ``y = alpha_i q``, q = sgn(w), or for 1.58 bits sgn(w) 1[|w| > eta max|w|], one alpha_i per block.

    ``g_alpha_i = sum g q`` over the block with no factor, ``g_w = g`` everywhere; alpha_i starts at the mean of
    |w| over its block.  For one bit the stored scale is 2 alpha, the distance of the two levels.
    """

    learns_scale: ClassVar[bool] = True
    eta: float = 0.05

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Binary or ternary, with static scales per pixel of the kernel."""
        kinds = ("pixel", "channel", "tensor", "group")
        needs = {"symmetric": True, "dynamic": False, "grid": "int", "range": ("plain", "scale")}
        return demand(spec, where, "syq", bits=(1, 1.58), granularity=kinds, observer="absmean", **needs)

    @property
    def needs_bins(self) -> bool:
        """The codes are the scale's gradient."""
        return True

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The threshold in units of each scale; it is not looked at with one bit."""
        if quantizer.grid.bits == 1:
            return ()
        top = x.detach().abs().amax().to(torch.promote_types(x.dtype, torch.float32))
        return (self.eta * top / scale.detach(),)

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """The sign, of what lies beyond the threshold."""
        return ternary(u, inputs[0]) if inputs else super().assign(u, grid, inputs, training)

    def edges(self, grid: Grid) -> tuple[float, float]:
        """Gradients pass everywhere."""
        return (-math.inf, math.inf)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """Straight-through for w; no part of it for the scale, which leaves ``sum g q``."""
        return Gradient(g, g.new_zeros(()), (None,) * len(inputs))
