"""Oscillation dampening: weights are pulled towards their level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.schedule import Schedule, as_schedule

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Dampen(Estimator):
    """Oscillation dampening: weights are pulled towards their level.

    The loss gains ``lam(t) * sum (clip(w) - Q(w))^2`` with Q and the scale constant:
    ``g_w = g + 2 lam(t) * (w - Q(w))`` inside the range, 0 outside.  Activations: straight-through.

    Args:
        lam: lam(t): a number, or the fields of a ``Schedule``.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv:2203.11086.
    Deviation: the default of lam (0 for 0.3 of the run, then on a cosine to 1e-2) is ours.  The authors' scripts have
    a cosine to 0.1 from a quarter of the run on, and for each layer the mean over a kernel's elements of the sum over
    output channels; here it is the plain sum.
    """

    lam: Any = field(default_factory=lambda: {"curve": "cosine", "start": 0.0, "end": 1e-2, "delay": 0.3})
    about: ClassVar[About] = About("Nagel et al. 2022", "2203.11086", "2-8", "scale")
    learns_scale: ClassVar[bool] = True
    _lam: Schedule = field(init=False, repr=False, default=Schedule())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lam", as_schedule(self.lam, "dampen.lam"))
        if min(self._lam.values) < 0:
            raise ValueError(explain("dampen.lam", "values >= 0", self.lam, "0 is the straight-through estimator."))

    def role(self, is_weight: bool) -> Estimator:
        """Only weights oscillate: they persist from step to step."""
        return self if is_weight else Lsq()

    @property
    def needs_bins(self) -> bool:
        """Only the pull looks at the error."""
        return any(self._lam.values)

    def schedules(self) -> Mapping[str, Schedule]:
        """lam(t)."""
        return {"lam": self._lam}

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The pull's factor, 0-dim."""
        return (quantizer.pull_factor(x),)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class; at and beyond the ends of the range the error is 0."""
        if bins is None or not self.needs_bins:
            return Gradient(g, g, (None,))
        pulled = torch.addcmul(g, bins.error(), bins.scale.to(g.dtype) * inputs[0].to(g.dtype))
        return Gradient(pulled, g, (None,))

    def penalty(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor | None:
        """lam(t) * ||clip(w) - Q(w)||^2."""
        bins = quantizer.bins(x, scale, zero, ())
        return (bins.error() * bins.scale).square().sum() * quantizer.pull_factor(x) / 2
