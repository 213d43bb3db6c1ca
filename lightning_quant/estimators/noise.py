"""Noise that stands for quantization in training: a random subset is quantized, or all weights are jittered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain, unknown
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient
from lightning_quant.estimators.ste import Ste
from lightning_quant.estimators.stochastic import Stochastic
from lightning_quant.grid import Grid
from lightning_quant.noise import seed, uniform
from lightning_quant.schedule import Schedule, as_schedule

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

KINDS = ("subset", "uniform")


@dataclass(frozen=True)
class Noise(Estimator):
    """Quantization noise on weights in training: Quant-Noise's random subset, or uniform noise.

    ``subset``: a random share ``rate`` of blocks is quantized at every step, the rest is float;
    ``uniform``: ``y = x + scale * n``, n uniform in [-1/2, 1/2), clamped to the range.
    ``g_x = g`` inside the range, 0 outside.  Evaluation takes the nearest level; so do activations, always.

    Args:
        kind: ``subset`` or ``uniform``.
        rate: Only for ``subset``: share of quantized blocks, a number or the fields of a ``Schedule``.
        block: Only for ``subset``: consecutive elements of a row that are quantized together.

    Source: ``subset``: Fan et al., "Training with Quantization Noise for Extreme Model Compression", ICLR 2021,
    arXiv:2004.07320; ``uniform``: Defossez, Adi, Synnaeve, "Differentiable Model Compression via Pseudo
    Quantization Noise", arXiv:2104.09987.
    Deviation: ``subset``: values beyond the range stay as they are while they are float (the authors' code clamps
    them), though no gradient passes there either way; a learned scale's gradient is that of a step in which every
    block is quantized; activations carry no noise.
    ``uniform``: bits are fixed, not learned.
    """

    kind: str = "subset"
    rate: Any = 0.5
    block: int = 1
    about: ClassVar[About] = About("Fan et al. 2020", "2004.07320", "2-8", "nothing")
    _rate: Schedule = field(init=False, repr=False, default=Schedule())

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown("kind", self.kind, KINDS, "noise.kind"))
        object.__setattr__(self, "_rate", as_schedule(self.rate, "noise.rate"))
        if not all(0 <= value <= 1 for value in self._rate.values):
            raise ValueError(explain("noise.rate", "values in [0, 1]", self.rate, "The authors use 0.5."))
        if self.block < 1:
            raise ValueError(explain("noise.block", "1 or more elements", self.block, "Use 1 or 8."))

    def role(self, is_weight: bool) -> Estimator:
        """The kind's own class; activations are straight-through."""
        if not is_weight:
            return Ste()
        return Subset(self._rate, self.block) if self.kind == "subset" else Jitter()


@dataclass(frozen=True)
class Subset(Estimator):
    """Weights of ``kind='subset'``: see ``Noise``."""

    rate: Schedule
    block: int

    def schedules(self) -> Mapping[str, Schedule]:
        """The share of quantized blocks."""
        return {"rate": self.rate}

    def state(self, quantizer: FakeQuantizer) -> None:
        """The optimizer step, which the noise is a function of."""
        quantizer.track_step()

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The noise's seed and the rate, both 0-dim."""
        return seed(quantizer.step, quantizer.salt), quantizer.rate

    def blend(self, x: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Quantized where a block is drawn."""
        start, rate = inputs
        rows = x.flatten(1)
        blocks = -(-rows.shape[1] // self.block)
        drawn = uniform(torch.Size((len(rows), blocks)), start) < rate
        drawn = drawn.unsqueeze(-1).expand(-1, -1, self.block).flatten(1)[:, : rows.shape[1]]
        return y.where(drawn.reshape(x.shape), x)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """Straight through, of quantized and of float values alike."""
        return Gradient(g, g, (None, None))


@dataclass(frozen=True)
class Jitter(Stochastic):
    """Weights of ``kind='uniform'``: see ``Noise``.  State and gradient are those of stochastic rounding."""

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """In training places between the levels."""
        if not training:
            return super().assign(u, grid, inputs, training)
        return u.add_(uniform(u.shape, inputs[0])).sub_(0.5).clamp_(grid.low, grid.high)
