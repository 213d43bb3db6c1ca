"""Differentiable soft quantization: the backward pass sees a staircase of tanh curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient
from lightning_quant.schedule import Schedule, as_schedule

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Dsq(Estimator):
    """Differentiable soft quantization (DSQ) with a hard forward.

    With r in [-1/2, 1/2] the place between two levels, s = 1 / (1 - alpha), K = ln(2/alpha - 1):
    ``g_x = g * (s K / 2) * sech^2(K r)``; the slope's mean over a bin is 1.
    ``g_alpha = sum g * (scale/2) * (s^2 tanh(K r) - s * 2r / (alpha (2 - alpha)) * sech^2(K r))``.

    Args:
        alpha: ``"learned"`` (one per quantizer, starting at ``initial``), a number in (0, 1), or the fields
            of a ``Schedule``; the classic annealing is ``{"curve": "linear", "start": 0.2, "end": 0.02}``.
        initial: Where a learned alpha starts.
        floor: Smallest learned alpha.
        ceiling: Largest learned alpha (alpha near 1 is the straight-through estimator).
        state_lr: Learning rate of alpha as a factor on its layer's.

    Source: Gong et al., "Differentiable Soft Quantization", ICCV 2019, arXiv:1908.05033, eqs. 5-9.
    Deviation: the range is one learned scale (LSQ's gradient, which sees the hard staircase); ``range="bounds"``
    has the paper's two learned ends, whose gradients are those of the soft staircase.  The forward is the hard
    staircase at training time too, as in the authors' training pipeline.
    """

    about: ClassVar[About] = About("Gong et al. 2019", "1908.05033", "1-8", "scale or bounds, alpha")
    drawn: ClassVar[tuple[Mapping[str, Any], ...]] = ({"alpha": 0.4}, {"alpha": 0.2}, {"alpha": 0.05})
    alpha: Any = "learned"
    initial: float = 0.2
    floor: float = 1e-3
    ceiling: float = 0.5
    state_lr: float = 1.0
    learns_scale: ClassVar[bool] = True
    _schedule: Schedule | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if not 0 < self.floor <= self.initial <= self.ceiling < 1:
            got = (self.floor, self.initial, self.ceiling)
            raise ValueError(explain("dsq", "0 < floor <= initial <= ceiling < 1", got, "The paper starts at 0.2."))
        if self.alpha != "learned":
            schedule = as_schedule(self.alpha, "dsq.alpha")
            if not all(0 < value < 1 for value in schedule.values):
                raise ValueError(explain("dsq.alpha", "values in (0, 1)", self.alpha, "MQBench fixes it at 0.4."))
            object.__setattr__(self, "_schedule", schedule)

    @property
    def needs_bins(self) -> bool:
        """Always."""
        return True

    def schedules(self) -> Mapping[str, Schedule]:
        """Alpha over optimizer steps, unless it is learned."""
        return {} if self._schedule is None else {"alpha": self._schedule}

    def state(self, quantizer: FakeQuantizer) -> None:
        """A learned alpha is a parameter of shape (1,)."""
        if self._schedule is None:
            start = torch.full((1,), self.initial, dtype=quantizer.dtype, device=quantizer.device)
            quantizer.register_parameter("alpha", nn.Parameter(start))

    def learned(self, quantizer: FakeQuantizer) -> Mapping[str, float]:
        """Alpha, if it is learned."""
        return {"alpha": self.state_lr} if self._schedule is None else {}

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Alpha, shape (1,) or 0-dim; under ``bounds`` once more, which asks for the soft staircase."""
        alpha = quantizer.alpha
        return (alpha, alpha.detach()) if quantizer.spec.range == "bounds" else (alpha,)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        assert bins is not None
        alpha, *ends = inputs
        a = alpha.to(g.dtype)
        s = 1 / (1 - a)
        hardness = torch.log(2 / a - 1)
        r = bins.offset(bins.error())
        # tanh(z) = 2 sigmoid(2z) - 1 and sech^2(z) = 4 sigmoid(2z) (1 - sigmoid(2z)): a sixth of tanh's cost.
        sigmoid = torch.sigmoid_(r * (2 * hardness))
        task = torch.ops.aten.sigmoid_backward(g, sigmoid).mul_(2 * s * hardness)
        soft = torch.addcmul(bins.u - r, sigmoid - 0.5, s) if ends else None
        rest = (None,) * len(ends)
        if self._schedule is not None:
            return Gradient(task, task, (None, *rest), soft)
        steeper = _total(sigmoid.sub_(0.5).mul_(g), bins.scale) * (s * s)
        narrower = _total(r.mul_(task), bins.scale) * (2 / (a * (2 - a) * hardness))
        return Gradient(task, task, ((steeper - narrower).to(alpha.dtype).reshape(alpha.shape), *rest), soft)

    def project(self, quantizer: FakeQuantizer, weight: Tensor | None = None) -> None:
        """Keep a learned alpha inside [floor, ceiling]."""
        if self._schedule is None:
            quantizer.alpha.data.clamp_(self.floor, self.ceiling)

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """A learned alpha."""
        return {"alpha": quantizer.alpha.detach().float().mean()} if self._schedule is None else {}


def _total(x: Tensor, scale: Tensor) -> Tensor:
    """Sum of ``x * scale``, summed over each block before its scale comes in."""
    return x.sum_to_size(scale.shape).mul_(scale).sum()
