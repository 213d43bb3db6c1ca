"""The contract every method fulfils, and the one autograd function they all run in.

    y   = Q(x)                              hard forward
    g_x = rule(g, u, ...) inside the range, 0 outside
    g_s = factor * sum( g * (code - zero) - rule_task(g, u, ...) * (u - zero) )

with u = x / scale + zero in code units.  The last line is the chain rule through y = s * (Q(u) - z) with
the estimator's dQ/du; for the straight-through estimator it is LSQ's gradient of the step size.  On a codebook
``code`` and ``u`` there are the levels and the input in units of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.grid import Grid, beyond
from lightning_quant.schedule import Schedule
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from typing import Self

    from lightning_quant.quantizer import FakeQuantizer


class Gradient(NamedTuple):
    """What a rule returns.

    Attributes:
        x: dL/du times 1/scale, i.e. the gradient of the input before the range's mask; real units.
        task: The part of ``x`` that comes from the task loss (feeds the scale's gradient).
        state: One gradient (or None) per tensor of ``Estimator.inputs``.
        soft: What stands for the code in the scale's gradient, as a place like ``Bins.u``; None: the code.
    """

    x: Tensor
    task: Tensor
    state: tuple[Tensor | None, ...]
    soft: Tensor | None = None


class Bins(NamedTuple):
    """Where inputs lie between grid levels, all in code units.

    Attributes:
        u: Input clamped to [low, high]; on a codebook its place, interpolated between levels.
        code: The code it got.
        low: Lowest code.
        high: Highest code.
        scale: Real distance of neighbouring levels, broadcastable.
        raw: The input before clamping, in units of the scale and zero point included.
    """

    u: Tensor
    code: Tensor
    low: int
    high: int
    scale: Tensor
    raw: Tensor

    def error(self) -> Tensor:
        """Distance to the nearest code, u - code, in [-1/2, 1/2]."""
        return self.u - self.code

    def offset(self, error: Tensor) -> Tensor:
        """Position inside the bin between two levels, in [-1/2, 1/2], for ``error``; -1/2 or 1/2 on a level."""
        return error - torch.copysign(error.new_full((), 0.5), error)


class About(NamedTuple):
    """What the table of methods says.

    Attributes:
        paper: Authors and year.
        link: arXiv number or another address; empty for what is ours.
        bits: Widths it makes sense for.
        learned: What is trained beside the weights.
        scheme: A scheme it is made for: what plots and examples use.
    """

    paper: str
    link: str
    bits: str
    learned: str
    scheme: str = "w4a16"


@dataclass(frozen=True)
class Estimator:
    """A method: hyper-parameters as fields, formulas as methods, state held by the quantizer.

    Class attributes: ``about``, its line in the table of methods; ``learns_scale``, whether ranges are learned
    unless the user says otherwise; ``drawn``, the settings its plot compares.
    """

    about: ClassVar[About] = About("", "", "1-8", "nothing")
    learns_scale: ClassVar[bool] = False
    drawn: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @property
    def holds_elements(self) -> bool:
        """Whether it keeps state per weight element that no optimizer shards, which sharded weights rule out."""
        return False

    @property
    def moves_weights(self) -> bool:
        """Whether ``project`` writes to the weight it is given."""
        return self.holds_elements

    def role(self, is_weight: bool) -> Estimator:
        """The estimator of weights, or of layer inputs, where a method treats them differently."""
        return self

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """The spec with what this method decides filled in: see ``demand``.

        Raises:
            ValueError: The user asked for something the method excludes.
        """
        return spec

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

    def transform(self, quantizer: FakeQuantizer, x: Tensor) -> Tensor:
        """Map the tensor before the grid, differentiably; ``x`` itself without one."""
        return x

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Tensors the rule reads, in its own order; the ones that need gradients get them.

        Args:
            quantizer: Holds the state.
            x: Input as ``view`` shaped it, after any offset.
            scale: Scale, broadcastable.
        """
        return ()

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """Codes of ``u`` on a uniform grid; may work in place.  Codebooks take the nearest level."""
        return u.round_().clamp_(grid.low, grid.high)

    def decode(self, code: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Levels of codes on a uniform grid, in units of the scale and before the zero point; default: the codes."""
        return code

    def edges(self, grid: Grid) -> tuple[float, float] | None:
        """Ends of the range in which gradients pass, in units of the scale; None: the outermost levels."""
        return None

    def output(self, quantizer: FakeQuantizer, y: Tensor) -> Tensor:
        """The layer's output, for methods that quantize the gradient that comes back through it."""
        return y

    def view(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Input and scale reshaped to blocks that the estimator's own state is shared over."""
        return x, scale

    def blend(self, x: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Forward value in training, given float ``x`` and quantized ``y``; evaluation always uses ``y``."""
        return y

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """The rule.  ``bins`` is None only if ``needs_bins`` is False and nothing else asked for it."""
        return Gradient(g, g, (None,) * len(inputs))

    @property
    def needs_bins(self) -> bool:
        """Whether ``gradient`` looks at positions inside bins (False lets the backward skip them)."""
        return False

    def penalty(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor | None:
        """The loss term whose closed-form gradient ``gradient`` holds, for logging; None without one."""
        return None

    def project(self, quantizer: FakeQuantizer, weight: Tensor | None = None) -> None:
        """After an optimizer step: bring state (and a weight, if the method owns parts of it) to its domain."""

    def before_optimizer_step(self, quantizer: FakeQuantizer, weight: Tensor) -> None:
        """Update state that no optimizer holds, from the weight's reduced gradient."""

    @property
    def follows_curvature(self) -> bool:
        """Whether the controller shall measure the loss's curvature, every ``period`` (a share) of the run."""
        return False

    def take_curvature(self, quantizer: FakeQuantizer, trace: float, spread: float) -> None:
        """What was measured at the quantizer's output: see ``curvature.curvature``."""

    def calibration(self, total: int | None) -> int:
        """Optimizer steps in which static input ranges follow the data at least: see ``QuantConfig.calibration``."""
        return 0

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """State worth logging, by name, each a 0-dim tensor."""
        return {}


def demand(spec: TensorSpec, where: str, method: str, **needs: Any) -> TensorSpec:
    """Fill in what is open in a spec and refuse what contradicts a method.

    Args:
        spec: The user's.
        where: Path of the tensor, for the message.
        method: Name of the method.
        needs: Field -> the value it must have, or a tuple of allowed ones of which the first is the default.

    Returns:
        The completed spec.

    Raises:
        ValueError: A field set to something else.

    >>> demand(TensorSpec(bits=2), "fc.weight", "seq", grid="midrise").grid
    'midrise'
    """
    filled: dict[str, Any] = {}
    for name, need in needs.items():
        allowed = need if isinstance(need, tuple) else (need,)
        value = getattr(spec, name)
        if value is None or value == "auto":
            filled[name] = allowed[0]
        elif value not in allowed:
            cure = f"Set {name} to {' or '.join(repr(v) for v in allowed)}, or choose another method."
            words = f"{name} in {allowed}" if len(allowed) > 1 else f"{name}={allowed[0]!r}"
            raise ValueError(explain(f"{where}: method {method!r}", words, f"{name}={value!r}", cure))
    return replace(spec, **filled)


def overrides(rule: Estimator, *names: str) -> bool:
    """Whether the estimator's class has its own version of one of these methods."""
    return any(getattr(type(rule), name) is not getattr(Estimator, name) for name in names)


def option_names(kind: type[Estimator]) -> list[str]:
    """The settings a user may give."""
    return [f.name for f in fields(kind) if f.init]


class FakeQuantize(torch.autograd.Function):
    """Hard quantization forward, an estimator's rule backward.

    Saves the input (a weight is resident anyway), the estimator's tensors and small ones; nothing at all
    where the backward is the identity.  It is a chain of float passes because those run at the speed of
    memory everywhere; comparisons, masks of bool and tanh cost 5 to 30 passes each on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        """Quantize.

        Dynamo takes ``ctx`` away from functions that have as many parameters as ``apply`` got arguments, where no
        gradient is wanted: hence ``args``, in this order.

        * scale: Real scales, broadcastable.
        * zero: Zero points in code units, or one number.
        * table: The grid's codebook (``Grid.table``), or None.
        * grid: What codes stand for.
        * clips: Whether values can lie outside the range (False under dynamic absmax scales).
        * factor: What the scale's gradient is multiplied with.
        * interior: Whether values inside the range move the scale.
        * training: Let the rule blend float values into the output and draw random numbers.
        * rule: The estimator.
        * Its tensors.
        """
        return begin(ctx, quantized, x, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Apply the rule; see the module's formulas."""
        return finish(ctx, gradients, grad)


def begin(ctx: Any, quantized: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Save what backward needs, and quantize.

    Args:
        ctx: Autograd's.
        quantized: The function of that name, or what computes the same.
        x: The input.
        args: See ``FakeQuantize``.
    """
    scale, zero, table, grid, clips, factor, interior, training, rule, *rest = args
    if clips or rule.needs_bins or ctx.needs_input_grad[1]:
        tensors = (zero, table) if isinstance(zero, Tensor) else (table,)
        ctx.save_for_backward(x, scale, *tensors, *rest)
    ctx.zero, ctx.factor = None if isinstance(zero, Tensor) else zero, factor
    ctx.settings = Settings(grid, clips, interior, training, rule)
    return quantized(ctx.settings, x, scale, zero, table, *rest)


def finish(ctx: Any, gradients: Callable[..., Gradients], grad: Tensor) -> tuple[Any, ...]:
    """What autograd wants, one per argument of ``apply``, out of ``gradients`` or what computes the same."""
    settings: Settings = ctx.settings
    learns = ctx.needs_input_grad[1]
    if not (settings.clips or settings.rule.needs_bins or learns):
        return (grad, *(None,) * (len(ctx.needs_input_grad) - 1))
    x, scale, *rest = ctx.saved_tensors
    zero = ctx.zero
    if zero is None:
        zero, *rest = rest
    found = gradients(settings, learns, grad, x, scale, zero, *rest)
    moved = None if found.scale is None else found.scale.mul_(ctx.factor).to(scale.dtype)
    return (found.x, moved, *(None,) * 8, *found.state)


class Settings(NamedTuple):
    """What is constant in a quantizer's arithmetic: see ``FakeQuantize.forward``."""

    grid: Grid
    clips: bool
    interior: bool
    training: bool
    rule: Estimator


class Gradients(NamedTuple):
    """Of the input, the scale (before its factor and in float32) and the rule's tensors; and the rounded input."""

    x: Tensor
    scale: Tensor | None
    state: tuple[Tensor | None, ...]
    y: Tensor | None = None


def quantized(
    settings: Settings,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    table: Tensor | None,
    *inputs: Tensor,
    spare: Tensor | None = None,
) -> Tensor:
    """The forward's arithmetic; ``spare``: memory of the shape and dtype of ``x`` that it may use and return."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    u = torch.div(wide, scale, out=spare if wide is x else None)
    if isinstance(zero, Tensor) or zero != 0:
        u = u.add_(zero)
    return leveled(settings, u, wide, scale, zero, table, inputs).to(x.dtype)


def leveled(
    settings: Settings,
    u: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    table: Tensor | None,
    inputs: tuple[Tensor, ...],
) -> Tensor:
    """The rounded value of ``x``, whose place is ``u``; works in place of ``u``."""
    grid, _, _, training, rule = settings
    y = grid.round(u, table) if table is not None else rule.decode(rule.assign(u, grid, inputs, training), inputs)
    if isinstance(zero, Tensor) or zero != 0:
        y = y.sub_(zero)
    y = y.mul_(scale)
    return rule.blend(x, y, inputs) if training else y


def gradients(
    settings: Settings,
    learns: bool,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    table: Tensor | None,
    *inputs: Tensor,
    spare: Tensor | None = None,
    again: bool = False,
) -> Gradients:
    """The backward's arithmetic.

    Args:
        settings: What is constant.
        learns: Whether the scale wants a gradient.
        grad: Gradient of the rounded tensor.
        x: The input, as ``view`` shaped it.
        scale: Real scales, broadcastable.
        zero: Zero points, or one number.
        table: The codebook, or None.
        inputs: The rule's tensors.
        spare: Memory of the shape and dtype of ``x`` that may be used; with it ``grad`` may be overwritten too.
        again: Whether to round ``x`` once more.
    """
    grid, clips, interior, training, rule = settings
    offset = isinstance(zero, Tensor) or zero != 0
    wide = torch.promote_types(x.dtype, torch.float32)
    g = grad.to(wide)
    real = x.to(wide)
    u = torch.div(real, scale, out=spare if x.dtype is wide else None)
    if offset:
        u = u.add_(zero)
    into = None if spare is None or learns else g  # the scale's gradient is that of clipped values as well
    kept = inside(g, u, *grid.span(rule.edges(grid)), into) if clips else g
    bins = None
    if learns or rule.needs_bins:
        bins = locate(u, scale, table, grid, rule, inputs, training)
    out = rule.gradient(kept, bins, inputs)
    scale_grad = None
    if learns and bins is not None:
        code = out.soft if out.soft is not None else bins.code if interior else bins.u
        if out.soft is None and interior:
            code = rule.decode(code, inputs)
        if table is not None:
            code = grid.level(code, table)
        code, real = (code - zero, u - zero) if offset else (code, u)
        terms = (g * code).addcmul_(out.task, real, value=-1)
        scale_grad = terms.sum_to_size(scale.shape)
    y = leveled(settings, u, real, scale, zero, table, inputs).to(x.dtype) if again else None
    return Gradients(out.x.to(grad.dtype), scale_grad, out.state, y)


def locate(
    u: Tensor,
    scale: Tensor,
    table: Tensor | None,
    grid: Grid,
    rule: Estimator,
    inputs: tuple[Tensor, ...],
    training: bool,
) -> Bins:
    """Bins of ``u``, the input in units of the scale with the zero point added."""
    if table is not None:
        place, width = grid.place(u, table)
        return Bins(place, grid.nearest(u, table), grid.low, grid.high, width * scale, u)
    clamped = u.clamp(grid.low, grid.high)
    code = rule.assign(u.clone(), grid, inputs, training) if overrides(rule, "assign") else clamped.round()
    return Bins(clamped, code, grid.low, grid.high, scale, u)


def inside(g: Tensor, u: Tensor, low: float, high: float, into: Tensor | None = None) -> Tensor:
    """``g`` where low <= u <= high, else 0: one pass of the hard tanh's derivative, whose ends are open."""
    eps, tiny = torch.finfo(u.dtype).eps, torch.finfo(u.dtype).tiny
    below, above = -beyond(-low, eps, tiny), beyond(high, eps, tiny)
    if into is not None:
        return torch.ops.aten.hardtanh_backward(g, u, below, above, grad_input=into)  # type: ignore[no-any-return]
    return torch.ops.aten.hardtanh_backward(g, u, below, above)  # type: ignore[no-any-return]
