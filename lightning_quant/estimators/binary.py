"""BinaryNet and XNOR-Net: weights, and inputs if they have one bit, keep nothing but their sign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_quant.errors import unknown
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand, inside
from lightning_quant.grid import Grid
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

ALPHAS = ("filter", "layer", "none")


@dataclass(frozen=True)
class Binary(Estimator):
    """Binary weights: the sign, times a mean magnitude (XNOR-Net) or alone (BinaryNet).

    See the classes of weights and inputs for their formulas.

    Args:
        alpha: ``filter``: one mean magnitude per output channel; ``layer``: one per layer; ``none``: the sign
            alone, with latent weights clipped to [-1, 1] after each optimizer step.

    Source: Courbariaux et al., "Binarized Neural Networks", 2016, arXiv:1602.02830, section 1 (``none``);
    Rastegari et al., "XNOR-Net", ECCV 2016, arXiv:1603.05279, section 3 (``filter``).
    Deviation: weights have one bit, inputs any width; inputs of other widths are those of ``ste``.
    """

    about: ClassVar[About] = About(
        "Courbariaux et al. 2016; Rastegari et al. 2016", "1602.02830, 1603.05279", "1", "nothing", "w1"
    )
    drawn: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"alpha": "none"})
    alpha: str = "filter"

    def __post_init__(self) -> None:
        if self.alpha not in ALPHAS:
            raise ValueError(unknown("alpha", self.alpha, ALPHAS, "binary.alpha"))

    def role(self, is_weight: bool) -> Estimator:
        """Weights are clipped or scaled by row, inputs by token or layer."""
        return BinaryWeights(self.alpha) if is_weight else BinaryInputs(self.alpha)


@dataclass(frozen=True)
class _Sign(Estimator):
    """What both share: where the grid has one bit, the derivative of the sign is 1 for |x| <= 1, real; else 0."""

    alpha: str = "filter"

    def edges(self, grid: Grid) -> tuple[float, float] | None:
        """Everywhere, for the rule below to cut; the levels of BinaryNet are where it cuts already."""
        return (-math.inf, math.inf) if grid.bits == 1 and self.alpha != "none" else None

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The input and the scale, 2 alpha."""
        return (x.detach(), scale.detach()) if quantizer.grid.bits == 1 and self.alpha != "none" else ()

    def share(self, x: Tensor, scale: Tensor) -> float:
        """What passes at any x."""
        return 0.0

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        if not inputs:
            return Gradient(g, g, ())
        x, scale = inputs
        passed = inside(g, x.to(g.dtype), -1.0, 1.0) * (scale.to(g.dtype) / 2)
        share = self.share(x, scale)
        if share:
            passed = passed.add_(g, alpha=share)
        return Gradient(passed, passed, (None, None))


@dataclass(frozen=True)
class BinaryWeights(_Sign):
    """Weights: ``y = alpha sgn(w)``, sgn(0) = 1, alpha the mean of |w| over its n weights, or 1 for BinaryNet.

    XNOR-Net: ``g_w = g (1/n + alpha 1[|w| <= 1])``; BinaryNet: ``g_w = g 1[|w| <= 1]``, and w is clipped to [-1, 1]
    after each optimizer step.
    """

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """One bit; alpha is taken anew at every call."""
        kind = "channel" if self.alpha == "filter" else "tensor"
        observer = "unit" if self.alpha == "none" else "absmean"
        needs = {"symmetric": True, "dynamic": True, "grid": "int", "range": "scale", "learn_scale": False}
        return demand(spec, where, "binary", bits=1, granularity=kind, observer=observer, **needs)

    def share(self, x: Tensor, scale: Tensor) -> float:
        """1/n: alpha's own dependence on w, as the paper writes it."""
        return scale.numel() / max(x.numel(), 1)

    @property
    def moves_weights(self) -> bool:
        """BinaryNet clips them."""
        return self.alpha == "none"

    def project(self, quantizer: FakeQuantizer, weight: Tensor | None = None) -> None:
        """BinaryNet's latent weights stay in [-1, 1], outside of which their gradient is 0."""
        if self.alpha == "none" and quantizer.grid.bits == 1 and weight is not None:
            weight.data.clamp_(-1.0, 1.0)


@dataclass(frozen=True)
class BinaryInputs(_Sign):
    """Inputs of one bit: ``y = K sgn(x)``, sgn(0) = 1, K the mean of |x| per token, or 1 for BinaryNet.

    ``g_x = g K 1[|x| <= 1]``.  Inputs of other widths are those of ``ste``.

    Deviation: XNOR-Net's K of a convolution is a map over positions that multiplies the output; here static inputs,
    which those of convolution networks are, have one measured K per layer.
    """

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """One bit: symmetric; fixed for BinaryNet, measured per token or layer for XNOR-Net."""
        if spec.bits != 1:
            return spec
        needs: dict[str, Any] = {"symmetric": True, "grid": "int", "learn_scale": False}
        if self.alpha == "none":
            needs.update(granularity="tensor", dynamic=False)
        if spec.range != "auto":  # an open one lets the network decide between tokens and layers
            needs["range"] = "scale"
        return demand(spec, where, "binary", observer="unit" if self.alpha == "none" else "absmean", **needs)
