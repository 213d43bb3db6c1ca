"""Progressive replacement: a growing share of the values is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lightning_quant.estimators.base import About, Bins, Estimator, Gradient
from lightning_quant.noise import uniform
from lightning_quant.schedule import Schedule, as_schedule

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class PegeReplace(Estimator):
    """PEGE as its abstract describes it: random element-wise replacement under a logarithmic curriculum.

    ``x~ = x + m * (Q(x) - x)``, m ~ Bernoulli(p(t)) anew at every optimizer step, in training;
    ``g_x = g inside the range + 2 lam(t) * m * (x - Q(x))``, the closed-form gradient of
    ``lam(t) * ||m * (x - Q(x))||^2`` (sum over a weight's elements, mean over an activation's).
    Evaluation and export use m = 1.

    Args:
        share: p(t): a number, or the fields of a ``Schedule``.
        lam: lam(t), likewise.

    Source: Zhao, "Progressive Element-wise Gradient Estimation", arXiv:2509.00097 (abstract).
    Deviation: only the abstract was available to us; the base (10) of the logarithm and the form of the
    co-optimised error are our reconstruction.
    """

    about: ClassVar[About] = About("Zhao 2025 (its abstract)", "2509.00097", "1-8", "nothing")
    share: Any = field(default_factory=lambda: {"curve": "replacement", "start": 0.0, "end": 1.0, "until": 0.8})
    lam: Any = 0.0
    _share: Schedule = field(init=False, repr=False, default=Schedule())
    _lam: Schedule = field(init=False, repr=False, default=Schedule())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_share", as_schedule(self.share, "pege_replace.share"))
        object.__setattr__(self, "_lam", as_schedule(self.lam, "pege_replace.lam"))

    @property
    def needs_bins(self) -> bool:
        """Only the pull looks at the error."""
        return any(self._lam.values)

    def schedules(self) -> Mapping[str, Schedule]:
        """p(t) and lam(t)."""
        return {"share": self._share, "lam": self._lam}

    def state(self, quantizer: FakeQuantizer) -> None:
        """The optimizer step, which the noise is a function of."""
        quantizer.track_step()

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Mask in {0, 1} of the input's shape, and the pull's factor."""
        mask = (uniform(x.shape, quantizer.step, quantizer.salt) < quantizer.share).to(x.dtype)
        return mask, quantizer.pull_factor(x)

    def blend(self, x: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Quantized where the mask is set."""
        mask = inputs[0] != 0
        return y.where(mask, x)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        if bins is None or not self.needs_bins:
            return Gradient(g, g, (None, None))
        mask, factor = inputs
        error = (bins.u - bins.code).mul_(bins.scale).mul_(mask)
        return Gradient(error.mul_(factor).add_(g), g, (None, None))

    def penalty(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor | None:
        """lam(t) * ||m (x - Q(x))||^2."""
        inputs = mask, factor = self.inputs(quantizer, x, scale)
        bins = quantizer.bins(x, scale, zero, inputs)
        return ((bins.u - bins.code) * bins.scale * mask).square().sum() * factor / 2
