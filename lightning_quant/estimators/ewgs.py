"""Element-wise gradient scaling: gradients grow or shrink by the sign of the rounding error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Ewgs(Estimator):
    """Element-wise gradient scaling (EWGS), delta fixed or from the Hessian.

    ``g_x = g * (1 + delta * sign(g) * (x_n - x_q))`` inside the range, where x_n - x_q is the rounding error
    as a share of the whole range, (u - code) / (high - low).  With ``delta="hessian"`` each quantizer has its
    own, ``max(0, (Tr(H) / N) / (3 std(g)))``, with H and g those of the loss in its output in units of the range,
    Tr by Hutchinson's method on one batch; it is 0 (straight-through) until the first update.

    Args:
        delta: Strength, >= 0 (0 is the straight-through estimator), or ``"hessian"``.
        period: Share of the run, in (0, 1], between updates of a delta from the Hessian; the authors update
            every 10 of 400 epochs on CIFAR-10.
        probes: At most this many random vectors per quantizer and update, each a double backward pass.
        tolerance: Fewer when a further one changes the trace by less than this share of it.

    Source: Lee, Kim, Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021,
    arXiv:2104.00903, eqs. 5 and 9.
    Deviation: the scale is learned with LSQ's gradient on a symmetric grid in place of two free bounds
    (``range="bounds"`` has them; the levels are real, so that they move with the ends and add to their gradients what
    the paper's normalized output lacks), and there is no output factor |alpha|.  The Hessian is that of one batch
    instead of the mean over three.  With several ranks or micro-batches g is that of each one's part of the batch.
    """

    about: ClassVar[About] = About("Lee, Kim, Ham 2021", "2104.00903", "1-8", "scale or bounds")
    drawn: ClassVar[tuple[Mapping[str, Any], ...]] = ({"delta": 0.0}, {"delta": 0.5}, {"delta": 1.0})
    learns_scale: ClassVar[bool] = True
    delta: float | str = 1e-3
    period: float = 0.025
    probes: int = 50
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        given = (self.delta, self.period, self.probes)
        if self.delta != "hessian" and (isinstance(self.delta, str) or self.delta < 0):
            raise ValueError(explain("ewgs.delta", "a number >= 0 or 'hessian'", self.delta, "The authors use 1e-3."))
        if not 0 < self.period <= 1 or self.probes < 1:
            expected = "a period in (0, 1] and at least one probe"
            raise ValueError(explain("ewgs (delta, period, probes)", expected, given, "Use 0.025 and 50."))

    @property
    def follows_curvature(self) -> bool:
        """Whether delta comes from the Hessian."""
        return self.delta == "hessian"

    @property
    def needs_bins(self) -> bool:
        """The rounding error is looked at unless delta is 0."""
        return self.delta != 0

    def state(self, quantizer: FakeQuantizer) -> None:
        """A delta from the Hessian is a buffer of shape (1,)."""
        if self.follows_curvature:
            delta = torch.zeros(1, dtype=quantizer.dtype, device=quantizer.device)
            quantizer.register_buffer("delta", delta)

    def take_curvature(self, quantizer: FakeQuantizer, trace: float, spread: float) -> None:
        """Set delta from Tr(H) / N and std(g)."""
        quantizer.delta.fill_(max(0.0, trace / (3 * spread)) if spread > 0 and math.isfinite(trace) else 0.0)

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Delta, if it is a tensor."""
        return (quantizer.delta,) if self.follows_curvature else ()

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        if bins is None or self.delta == 0:
            return Gradient(g, g, ())
        if inputs:
            error = (bins.u - bins.code).mul_(inputs[0].to(g.dtype) / (bins.high - bins.low))
            g = torch.addcmul(g, error, g.abs())
            return Gradient(g, g, (None,))
        assert not isinstance(self.delta, str)
        g = torch.addcmul(g, bins.u - bins.code, g.abs(), value=self.delta / (bins.high - bins.low))
        return Gradient(g, g, ())

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """A delta from the Hessian."""
        return {"delta": quantizer.delta.float().mean()} if self.follows_curvature else {}
