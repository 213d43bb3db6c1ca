"""IR-Net: a slope that starts as the identity and sharpens to the sign, over balanced weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand
from lightning_quant.estimators.bireal import signs
from lightning_quant.grid import UNIFORM, Grid
from lightning_quant.schedule import Schedule, as_schedule
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

TINY = 1e-12  # added to the variance


@dataclass(frozen=True)
class Ede(Estimator):
    """Error decay estimator (EDE) with balanced weights (IR-Net).

    With v = 2r, r the place between two levels in bins (for 1 bit with the levels +-1: v = x):
    ``g_x = g * k t (1 - tanh^2(t v))``, k = max(1/t, 1).  r runs on past +-1/2 beyond the outermost levels: no
    other mask cuts the gradient, which a growing t(t) takes from the identity to the derivative of the sign.
    Balance: ``w' = (w - mean) / std`` per output channel, differentiably, is what is quantized.

    Args:
        t: t over the run: a number, or the fields of a ``Schedule``.
        balance: Standardise weights.  The layer then computes with weights of variance 1, so it wants a
            normalisation behind it (BatchNorm), as in the paper; switch it off where there is none.

    Source: Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural Networks", CVPR 2020,
    arXiv:1909.10788.
    Deviation: more than 1 bit, where every bin has the slope, is ours.  The scale is the range's own, learned with
    LSQ's gradient, instead of the power of two nearest to mean|w'| (1 for activations), and v is in units of its level
    instead of standard deviations.  std divides by n, not n - 1.
    """

    t: Any = field(default_factory=lambda: {"curve": "geometric", "start": 0.1, "end": 10.0})
    balance: bool = True
    about: ClassVar[About] = About("Qin et al. 2020", "1909.10788", "1-2", "scale", "w1a1")
    learns_scale: ClassVar[bool] = True
    drawn: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"t": t, "balance": False} for t in (0.1, 1.0, 10.0))
    _t: Schedule = field(init=False, repr=False, default=Schedule())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_t", as_schedule(self.t, "ede.t"))
        if min(self._t.values) <= 0:
            raise ValueError(explain("ede.t", "values above 0", self.t, "The authors go from 0.1 to 10."))

    @property
    def needs_bins(self) -> bool:
        """Always."""
        return True

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """A uniform grid, since the slope runs on beyond it in steps of the scale; one bit is a sign."""
        return demand(signs(spec), where, "ede", grid=UNIFORM)

    def fit(self, rows: Mapping[str, tuple[int, int]], scales: Mapping[str, tuple[int, ...]]) -> Self:
        """Refuse to balance output channels of a single element, which would all become 0."""
        for path, (_, size) in rows.items():
            if self.balance and size == 1:
                cure = f'Set balance=False, or leave it in float: LayerRule(match="{path}", weight=None).'
                raise ValueError(explain(f"{path}: ede.balance", "2 or more weights per output channel", 1, cure))
        return self

    def schedules(self) -> Mapping[str, Schedule]:
        """The sharpness t."""
        return {"t": self._t}

    def transform(self, quantizer: FakeQuantizer, x: Tensor) -> Tensor:
        """Standardised weights, in float32 or wider; activations as they are."""
        if not (self.balance and quantizer.is_weight):
            return x
        axis, first = quantizer.granularity.axis or 0, int(quantizer.granularity.stacked)
        rows = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(axis, first)
        return F.layer_norm(rows, rows.shape[first + 1 :], eps=TINY).movedim(first, axis)

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """t, 0-dim."""
        return (quantizer.t,)

    def edges(self, grid: Grid) -> tuple[float, float] | None:
        """None: the slope itself decays."""
        return -torch.inf, torch.inf

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        assert bins is not None
        t = inputs[0].to(g.dtype)
        # |v| = 2|r| = 1 - 2 |u - code| inside; beyond the range, where u is its end, the excess comes on top.
        v = (bins.raw - bins.u).abs_().sub_((bins.u - bins.code).abs_()).mul_(2).add_(1)
        # sech^2(z) = 4 s (1 - s) with s = sigmoid(-2z), whose tail keeps its digits.
        sigmoid = torch.sigmoid_(v.mul_(-2 * t))
        task = torch.ops.aten.sigmoid_backward(g, sigmoid).mul_(4 * t.clamp(min=1))
        return Gradient(task, task, (None,))
