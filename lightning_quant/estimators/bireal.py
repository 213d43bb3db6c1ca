"""Bi-Real Net's slope: the derivative of a piecewise quadratic instead of the identity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lightning_quant.errors import unknown
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient
from lightning_quant.estimators.ste import Ste
from lightning_quant.scheme import TensorSpec

WEIGHTS = ("quadratic", "clipped")


@dataclass(frozen=True)
class BiReal(Estimator):
    """Piecewise-quadratic surrogate of the sign (Bi-Real Net).

    With r in [-1/2, 1/2] the place between two levels: ``g_x = g * (2 - 4 |r|)`` inside the range, 0 outside.
    For 1 bit with the levels +-1 that is ``2 - 2 |x|`` on [-1, 1]; the slope's mean over a bin is 1.

    Args:
        weights: ``quadratic``: weights have this slope too; ``clipped``: they have the clipped straight-through
            estimator, as in the paper.

    Source: Liu et al., "Bi-Real Net: Enhancing the Performance of 1-bit CNNs with Improved Representational
    Capability and Advanced Training Algorithm", ECCV 2018, arXiv:1808.00278.
    Deviation: the paper has this slope for the sign of activations only; its use on weights and its repetition in
    every bin of a wider grid are ours.  The scale is learned with LSQ's gradient.
    """

    weights: str = "quadratic"
    about: ClassVar[About] = About("Liu et al. 2018", "1808.00278", "1-4", "scale", "w1a1")
    learns_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(unknown("rule", self.weights, WEIGHTS, "bireal.weights"))

    def role(self, is_weight: bool) -> Estimator:
        """Weights may be clipped straight-through."""
        return StraightWeights() if is_weight and self.weights == "clipped" else self

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """See ``signs``."""
        return signs(spec)

    @property
    def needs_bins(self) -> bool:
        """Always."""
        return True

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        assert bins is not None
        return quadratic(g, bins)


class StraightWeights(Ste):
    """The straight-through estimator with a learned scale, for weights beside binary activations."""

    learns_scale: ClassVar[bool] = True


def signs(spec: TensorSpec) -> TensorSpec:
    """One bit is a sign unless the user says otherwise: two opposite levels, for activations of convolutions too."""
    return replace(spec, symmetric=True) if spec.bits == 1 and spec.symmetric is None else spec


def quadratic(g: Tensor, bins: Bins) -> Gradient:
    """``g (2 - 4 |r|)``: since |r| = 1/2 - |u - code|, four times the distance to the level."""
    task = (bins.u - bins.code).abs_().mul_(g).mul_(4)
    return Gradient(task, task, ())
