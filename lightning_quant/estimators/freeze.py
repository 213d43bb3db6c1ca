"""Iterative weight freezing: weights that keep jumping between two levels are stopped on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.schedule import Schedule, as_schedule
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

FROZEN, UNSEEN = 2, 3  # values of ``trend`` beside -1, 0 and 1
FINE = 0.005  # a smaller momentum's steps are not many units in the last place of float16


@dataclass(frozen=True)
class Freeze(Estimator):
    """Iterative weight freezing: weights that keep changing their code are stopped.

    After every optimizer step, per weight, with c its code and m the momentum: o = 1 if c changed in the direction
    opposite to its last change, else 0; ``f <- m o + (1 - m) f``.  Once f > threshold(t) the weight stays on the code
    round(c_avg), its gradient is 0, and whatever an optimizer does to it is undone; ``c_avg <- m c + (1 - m) c_avg``.
    A frozen weight keeps its code; where the scale is learned, its level moves with the scale and it adds
    ``g * code`` to the scale's gradient.  ``g_w = g`` inside the range for all others.  Activations: straight-through.

    Args:
        threshold: Frequency f, in [0, 1], above which a weight is frozen: a number, or the fields of a
            ``Schedule``; 1 never freezes.  It wants to lie well above m, which is what a single oscillation adds.
        momentum: m, in (0, 1].

    State: last code (uint8), trend (int8: direction of the last change, or frozen), f and the distance of c_avg to the
    last code: 6 bytes per weight, with m < 0.005 10 bytes, since float16 has too few digits then.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv:2203.11086.
    Deviation: the defaults are ours, for runs of some thousand steps.  The authors' scripts (4 bits, ImageNet) have
    m = 0.001, and no threshold for a quarter of the run, then one on a cosine from 0.1 to 0.01.
    """

    threshold: Any = field(default_factory=lambda: {"curve": "cosine", "start": 0.04, "end": 0.01})
    momentum: float = 0.01
    about: ClassVar[About] = About("Nagel et al. 2022", "2203.11086", "2-8", "scale")
    learns_scale: ClassVar[bool] = True
    _threshold: Schedule = field(init=False, repr=False, default=Schedule())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_threshold", as_schedule(self.threshold, "freeze.threshold"))
        if not all(0 <= value <= 1 for value in self._threshold.values):
            raise ValueError(explain("freeze.threshold", "values in [0, 1]", self.threshold, "1 never freezes."))
        if not 0 < self.momentum <= 1:
            raise ValueError(explain("freeze.momentum", "a number in (0, 1]", self.momentum, "Use 0.01."))

    @property
    def holds_elements(self) -> bool:
        """Codes, averages and frequencies."""
        return True

    def role(self, is_weight: bool) -> Estimator:
        """Only weights persist from step to step."""
        return self if is_weight else Lsq()

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """A scale that follows the weights at every step would move frozen weights to other codes."""
        return demand(spec, where, "freeze", dynamic=False)

    def schedules(self) -> Mapping[str, Schedule]:
        """The threshold."""
        return {"threshold": self._threshold}

    def state(self, quantizer: FakeQuantizer) -> None:
        """See the class."""
        digits = torch.float16 if self.momentum >= FINE else torch.float32
        kinds = {"last_code": torch.uint8, "trend": torch.int8, "drift": digits, "frequency": digits}
        for name, dtype in kinds.items():
            value = UNSEEN if name == "trend" else 0
            start = torch.full(quantizer.shape, value, dtype=dtype, device=quantizer.device)
            quantizer.register_buffer(name, start)

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The trend in the shape of ``x``."""
        return (quantizer.granularity.view(quantizer.trend).reshape(x.shape),)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """Nothing for frozen weights, which are ``scale * code``: for the scale they count with their code."""
        kept = g.masked_fill(inputs[0] == FROZEN, 0.0)
        return Gradient(kept, kept, (None,))

    @torch.no_grad()
    def project(self, quantizer: FakeQuantizer, weight: Tensor | None = None) -> None:
        """Count oscillations, freeze, and put frozen weights back on their levels."""
        if weight is None:
            return
        code, scale, zero, offset = quantizer.stored(weight)
        new, old, trend = code.to(torch.int16) - quantizer.low, quantizer.last_code.to(torch.int16), quantizer.trend
        frozen, unseen = trend == FROZEN, trend == UNSEEN
        move = (new - old).masked_fill_(frozen | unseen, 0)
        direction = move.sign().to(torch.int8)
        turned = direction * trend == -1
        drift = quantizer.drift.float() - move
        frequency = torch.lerp(quantizer.frequency.float(), turned.float(), self.momentum)
        freezing = ~frozen & ~unseen & (frequency > quantizer.threshold)
        quantizer.drift.copy_(drift * (1 - self.momentum))
        quantizer.frequency.copy_(frequency.where(~frozen, quantizer.frequency.float()))
        new += (drift.round_() * freezing).to(torch.int16)
        new = torch.where(frozen, old, new)
        trend = torch.where(direction != 0, direction, trend).masked_fill_(unseen, 0)
        frozen |= freezing
        quantizer.trend.copy_(trend.masked_fill_(frozen, FROZEN))
        quantizer.last_code.copy_(new)
        codes = quantizer.granularity.view((new + quantizer.low).float())
        levels = quantizer.granularity.unview(quantizer.real(codes, scale, zero, offset), weight.shape)
        weight.copy_(torch.where(frozen, levels.to(weight.dtype), weight))

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """Share of frozen weights, and mean frequency of the oscillations."""
        return {
            "frozen": (quantizer.trend == FROZEN).float().mean(),
            "frequency": quantizer.frequency.float().mean(),
        }
