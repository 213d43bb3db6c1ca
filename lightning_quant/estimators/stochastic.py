"""Stochastic rounding: up or down at random, right on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lightning_quant.estimators.base import About, Bins, Estimator, Gradient
from lightning_quant.grid import Grid
from lightning_quant.noise import seed, uniform

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Stochastic(Estimator):
    """Stochastic rounding in training, to the nearest level in evaluation.

    ``code = floor(u + n)`` with u = x/scale + zero clamped to the range and n uniform in [0, 1), drawn anew for
    every element at every optimizer step: the mean of the code over steps is u.  ``g_x = g`` inside the range.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015, arXiv:1502.02551; for
    gradients that pass straight through it Courbariaux et al., arXiv:1602.02830.
    Deviation: within one optimizer step all micro-batches and repeated forwards draw the same numbers; they are
    drawn again in the backward where a learned scale needs them, so that none are kept.
    """

    about: ClassVar[About] = About("Gupta et al. 2015", "1502.02551", "1-8", "nothing")

    def state(self, quantizer: FakeQuantizer) -> None:
        """The optimizer step, which the noise is a function of."""
        quantizer.track_step()

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The noise's seed, 0-dim."""
        return (seed(quantizer.step, quantizer.salt),)

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """See the class."""
        if not training:
            return super().assign(u, grid, inputs, training)
        below = u.clamp_(grid.low, grid.high).floor()  # apart from the fraction, so that levels stay put
        return u.sub_(below).add_(uniform(u.shape, inputs[0])).floor_().add_(below)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        return Gradient(g, g, (None,))
