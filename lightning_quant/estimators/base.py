"""The contract every gradient estimator fulfils, and the one autograd function they all run in.

    y   = Q(x)                              hard forward
    g_x = rule(g, u, ...) inside the range, 0 outside
    g_s = factor * sum( g * (code - zero) - rule_task(g, u, ...) * (u - zero) )

with u = x / scale + zero in code units.  The last line is the chain rule through y = s * (Q(u) - z) with
the estimator's dQ/du; for the straight-through estimator it is LSQ's gradient of the step size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_quant.schedule import Schedule

if TYPE_CHECKING:
    from typing import Self

    from lightning_quant.quantizer import FakeQuantizer


class Gradient(NamedTuple):
    """What a rule returns.

    Attributes:
        x: dL/du times 1/scale, i.e. the gradient of the input before the range's mask; real units.
        task: The part of ``x`` that comes from the task loss (feeds the scale's gradient).
        state: One gradient (or None) per tensor of ``Estimator.inputs``.
    """

    x: Tensor
    task: Tensor
    state: tuple[Tensor | None, ...]


class Bins(NamedTuple):
    """Where inputs lie between grid levels, all in code units.

    Attributes:
        u: Input clamped to [low, high].
        code: Nearest code.
        low: Lowest code.
        high: Highest code.
        scale: Real size of a code, broadcastable.
    """

    u: Tensor
    code: Tensor
    low: int
    high: int
    scale: Tensor

    def error(self) -> Tensor:
        """Distance to the nearest code, u - code, in [-1/2, 1/2]."""
        return self.u - self.code

    def offset(self, error: Tensor) -> Tensor:
        """Position inside the bin between two levels, in [-1/2, 1/2], for ``error``; -1/2 or 1/2 on a level."""
        return error - torch.copysign(error.new_full((), 0.5), error)


@dataclass(frozen=True)
class Estimator:
    """A gradient idea: hyper-parameters as fields, formulas as methods, state held by the quantizer."""

    learns_scale: ClassVar[bool] = False

    def schedules(self) -> Mapping[str, Schedule]:
        """Scheduled scalars by name; each becomes a 0-dim buffer of the quantizer."""
        return {}

    def fit(self, rows: Mapping[str, tuple[int, int]], scales: Mapping[str, tuple[int, ...]]) -> Self:
        """A copy adapted to the model: (out, n) of every weight and the shape of its scales, by layer."""
        return self

    def state(self, quantizer: FakeQuantizer) -> None:
        """Register what this estimator keeps per quantizer."""

    def learned(self, quantizer: FakeQuantizer) -> Mapping[str, float]:
        """Names of the quantizer's parameters this estimator learns, with their learning-rate factor."""
        return {}

    def inputs(self, quantizer: FakeQuantizer, x: Tensor) -> tuple[Tensor, ...]:
        """Tensors the rule reads, in its own order; the ones that need gradients get them."""
        return ()

    def view(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Input and scale reshaped to blocks that the estimator's own state is shared over."""
        return x, scale

    def blend(self, x: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Forward value in training, given float ``x`` and quantized ``y``; evaluation always uses ``y``."""
        return y

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """The rule.  ``bins`` is None only if ``needs_bins`` is False and nothing else asked for it."""
        return Gradient(g, g, ())

    @property
    def needs_bins(self) -> bool:
        """Whether ``gradient`` looks at positions inside bins (False lets the backward skip them)."""
        return False

    def penalty(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor | None:
        """The loss term whose closed-form gradient ``gradient`` holds, for logging; None without one."""
        return None

    def project(self, quantizer: FakeQuantizer) -> None:
        """Bring learned state back to its domain after an optimizer step."""

    def before_optimizer_step(self, quantizer: FakeQuantizer, weight: Tensor) -> None:
        """Update state that no optimizer holds, from the weight's reduced gradient."""

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """State worth logging, by name, each a 0-dim tensor."""
        return {}


class FakeQuantize(torch.autograd.Function):
    """Hard quantization forward, an estimator's rule backward.

    Saves the input (a weight is resident anyway), the estimator's tensors and small ones; nothing at all
    where the backward is the identity.  It is a chain of float passes because those run at the speed of
    memory everywhere; comparisons, masks of bool and tanh cost 5 to 30 passes each on a CPU.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | float,
        bounds: tuple[int, int],
        clips: bool,
        factor: float,
        blending: bool,
        rule: Estimator,
        *inputs: Tensor,
    ) -> Tensor:
        """Quantize.

        Args:
            ctx: Autograd's context.
            x: Real input, any floating dtype.
            scale: Real scales, broadcastable.
            zero: Zero points in code units, or one number.
            bounds: Lowest and highest code.
            clips: Whether values can lie outside the range (False under dynamic absmax scales).
            factor: LSQ's factor on the scale's gradient.
            blending: Let the rule blend float values into the output.
            rule: The estimator.
            inputs: Its tensors.
        """
        if clips or rule.needs_bins or ctx.needs_input_grad[1]:
            ctx.save_for_backward(x, scale, *((zero,) if isinstance(zero, Tensor) else ()), *inputs)
        ctx.constants = (None if isinstance(zero, Tensor) else zero, bounds, clips, factor, blending, rule)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        u = torch.div(wide, scale)
        offset = isinstance(zero, Tensor) or zero != 0
        if offset:
            u = u.add_(zero)
        y = u.round_().clamp_(*bounds)
        if offset:
            y = y.sub_(zero)
        y = y.mul_(scale)
        if blending:
            y = rule.blend(wide, y, inputs)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Apply the rule; see the module's formulas."""
        zero, (low, high), clips, factor, _, rule = ctx.constants
        learns = ctx.needs_input_grad[1]
        if not (clips or rule.needs_bins or learns):
            return (grad, *(None,) * (len(ctx.needs_input_grad) - 1))
        x, scale, *inputs = ctx.saved_tensors
        if zero is None:
            zero, *inputs = inputs
        offset = isinstance(zero, Tensor) or zero != 0
        wide = torch.promote_types(x.dtype, torch.float32)
        g = grad.to(wide)
        u = torch.div(x.to(wide), scale)
        if offset:
            u = u.add_(zero)
        kept = _inside(g, u, low, high) if clips else g
        bins = None
        if learns or rule.needs_bins:
            inside = u.clamp(low, high)
            bins = Bins(inside, inside.round(), low, high, scale)
        out = rule.gradient(kept, bins, tuple(inputs))
        scale_grad = None
        if learns and bins is not None:
            code, real = (bins.code - zero, u - zero) if offset else (bins.code, u)
            terms = (g * code).addcmul_(out.task, real, value=-1)
            scale_grad = terms.sum_to_size(scale.shape).mul_(factor).to(scale.dtype)
        return (out.x.to(grad.dtype), scale_grad, *(None,) * 6, *out.state)


def _inside(g: Tensor, u: Tensor, low: int, high: int) -> Tensor:
    """``g`` where low <= u <= high, else 0: one pass of the hard tanh's derivative, whose ends are open."""
    eps, tiny = torch.finfo(u.dtype).eps, torch.finfo(u.dtype).tiny
    below = low - eps * 2 ** ((-low).bit_length() - 1)
    above = high + (eps * 2 ** (high.bit_length() - 1) if high else tiny)
    return torch.ops.aten.hardtanh_backward(g, u, below, above)  # type: ignore[no-any-return]
