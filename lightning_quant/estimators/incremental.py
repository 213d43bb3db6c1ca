"""What methods share that freeze weights on their levels, a part at a time, until none is float."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import Bins, Estimator, Gradient, demand
from lightning_quant.estimators.ste import Ste
from lightning_quant.grid import Grid
from lightning_quant.schedule import Schedule, as_schedule
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

PHASES = ((0.0, 0.5), (0.25, 0.75), (0.5, 0.875), (0.75, 1.0))


@dataclass(frozen=True)
class Incremental(Estimator):
    """Freezing by magnitude; subclasses choose the grid and the gradient of what is still free.

    Of every weight tensor the share ``share(t)`` with the largest magnitudes lies on its levels, has no gradient and
    is put back after every optimizer step.  The rest is float in training and on the grid in evaluation.
    """

    share: Any = field(default_factory=lambda: {"curve": "steps", "points": PHASES})
    _share: Schedule = field(init=False, repr=False, default=Schedule())

    def __post_init__(self) -> None:
        where = f"{type(self).__name__.lower()}.share"
        schedule = as_schedule(self.share, where)
        values = schedule.values
        if list(values) != sorted(values) or values[0] < 0 or values[-1] != 1:
            expected = "shares in [0, 1] that never fall and end at 1"
            cure = "What is not frozen at the end of training is rounded in evaluation alone: end at 1, before the run."
            raise ValueError(explain(where, expected, self.share, cure))
        object.__setattr__(self, "_share", schedule)

    @property
    def holds_elements(self) -> bool:
        """Which weights are frozen, and on which level."""
        return True

    def role(self, is_weight: bool) -> Estimator:
        """Layer inputs are rounded straight through."""
        return self if is_weight else Ste()

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """The scale is the one read off the weights at the start: frozen weights could not follow it."""
        name = type(self).__name__.lower()
        return demand(spec, where, name, dynamic=False, learn_scale=False, range="scale")

    def schedules(self) -> Mapping[str, Schedule]:
        """share(t)."""
        return {"share": self._share}

    def state(self, quantizer: FakeQuantizer) -> None:
        """``held``: 0 for a free weight, else 1 + code - lowest code; a byte per weight, two on a full 8-bit grid."""
        kind = torch.uint8 if quantizer.high - quantizer.low < 255 else torch.int16
        quantizer.register_buffer("held", torch.zeros(quantizer.shape, dtype=kind, device=quantizer.device))
        quantizer.memo["reached"] = 0.0
        quantizer.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """``held`` in the input's shape."""
        return (quantizer.granularity.view(quantizer.held).reshape(x.shape),)

    def blend(self, x: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Free weights are float."""
        return y.where(inputs[0] != 0, x)

    def edges(self, grid: Grid) -> tuple[float, float]:
        """Free weights are float, so that nothing cuts their gradients."""
        return -math.inf, math.inf

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """None for frozen weights."""
        g = g.masked_fill(inputs[0] != 0, 0.0)
        return Gradient(g, g, (None,))

    def before_optimizer_step(self, quantizer: FakeQuantizer, weight: Tensor) -> None:
        """Freeze the largest free weights where the scheduled share has changed (the one place that may wait)."""
        share = quantizer.now["share"]
        if share == quantizer.memo["reached"]:
            return
        quantizer.memo["reached"] = share
        with torch.no_grad():
            held = quantizer.held.reshape(-1)
            taken = held != 0
            count = round(share * held.numel()) - int(taken.sum())
            if count <= 0:
                return
            size = weight.detach().abs().float().reshape(-1).masked_fill_(taken, -1.0)
            chosen = size.argsort(descending=True, stable=True)[:count]
            code = quantizer.stored(weight)[0].reshape(-1)[chosen].to(torch.int32)
            held[chosen] = (code + (1 - quantizer.low)).to(held.dtype)

    def project(self, quantizer: FakeQuantizer, weight: Tensor | None = None) -> None:
        """Put frozen weights back on their levels, whatever momentum or decay did to them."""
        if weight is None:
            return
        with torch.no_grad():
            held = quantizer.held
            wide = torch.promote_types(weight.dtype, torch.float32)
            code = quantizer.granularity.view(held).to(wide).sub_(1).clamp_(min=0).add_(quantizer.low)
            level = quantizer.granularity.unview(
                quantizer.real(code, *quantizer.scale_zero_offset(weight)), weight.shape
            )
            weight.copy_(torch.where(held != 0, level.to(weight.dtype), weight))

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """Share of frozen weights."""
        return {"frozen": (quantizer.held != 0).float().mean()}


def _forget(quantizer: Any, _: Any) -> None:
    """After loading, which weights are frozen is compared with the schedule anew."""
    quantizer.memo["reached"] = -1.0
