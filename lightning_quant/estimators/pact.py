"""PACT: inputs below one learned bound, weights as in DoReFa-Net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand
from lightning_quant.estimators.dorefa import DorefaWeights
from lightning_quant.schedule import Schedule
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Pact(Estimator):
    """PACT: a learned clipping bound for inputs; weights as in DoReFa-Net.

    See the classes of weights and inputs for their formulas.

    Args:
        decay: Coefficient c of the loss term ``c/2 alpha^2`` per bound; the paper takes the weights' own.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018,
    arXiv:1805.06085.
    Deviation: alpha starts where the observer ends and follows it during calibration, instead of starting at a
    constant.  The decay is a loss term with its closed-form gradient, so that an adaptive optimizer normalises it.
    """

    about: ClassVar[About] = About("Choi et al. 2018", "1805.06085", "1-8", "upper bound of inputs", "w4a4")
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.decay >= 0:
            raise ValueError(explain("pact.decay", "a number >= 0", self.decay, "Use the weights' decay, or 0."))

    def role(self, is_weight: bool) -> Estimator:
        """Weights are DoReFa's."""
        return PactWeights() if is_weight else PactInputs(self.decay)


@dataclass(frozen=True)
class PactWeights(DorefaWeights):
    """Weights: the tanh, over its largest magnitude, on the 2^k levels of [-1, 1], as in DoReFa-Net.

    ``t = tanh(w) / max|tanh w|``, ``y = 2 round(n (t / 2 + 1/2)) / n - 1``, n = 2^k - 1;
    ``g_w = g (1 - tanh(w)^2) / max|tanh w|``.  One bit: ``y = E|w| sgn(w)``, ``g_w = g``.
    """

    method: ClassVar[str] = "pact"


@dataclass(frozen=True)
class PactInputs(Estimator):
    """Inputs: ``y = s round(clip(x, 0, alpha) / s)``, s = alpha / (2^k - 1), alpha learned per layer.

    ``g_x = g`` where 0 <= x <= alpha, else 0; ``g_alpha = sum g 1[x > alpha] + c alpha``, c the decay.
    """

    learns_scale: ClassVar[bool] = True
    decay: float = 0.0

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """One bound per layer, static."""
        needs = {"granularity": "tensor", "symmetric": False, "dynamic": False, "grid": "int", "range": "clip"}
        return demand(spec, where, "pact", **needs)

    def schedules(self) -> Mapping[str, Schedule]:
        """The decay, under the name whose value follows the scale of the loss."""
        return {"lam": Schedule("constant", self.decay, self.decay)} if self.decay else {}

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The bound and its decay."""
        return (quantizer.upper, quantizer.lam) if self.decay else ()

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """Straight-through, and the decay's own."""
        if not inputs:
            return Gradient(g, g, ())
        upper, decay = inputs
        return Gradient(g, g, (upper * decay.to(upper.dtype), None))

    def penalty(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor | None:
        """c/2 alpha^2."""
        return (quantizer.upper.detach().square().sum() * quantizer.lam / 2) if self.decay else None
