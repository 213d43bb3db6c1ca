"""``quantized`` and ``gradients`` as operators: Triton kernels on CUDA, elsewhere the functions of ``base`` themselves.

PyTorch's compiler takes them as they are, so a model that holds them compiles as a whole.  They know the uniform grid,
a scale per row, and three rules: straight-through, element-wise scaling and PEGE's surrogate.  They have no autograd of
their own: ``CompiledFakeQuantize`` calls both.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_quant.estimators import base
from lightning_quant.estimators.base import Estimator, Gradients, Settings, overrides
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.pege import Pege
from lightning_quant.estimators.ste import Ste
from lightning_quant.grid import Grid

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def is_installed() -> bool:
    """Whether Triton is there; it is not imported for the answer."""
    return importlib.util.find_spec("triton") is not None


def fits(settings: Settings, x: Tensor, *rest: Any) -> bool:
    """Whether Triton's kernels do this quantizer's work: on CUDA, where the operators cover it."""
    return x.is_cuda and is_installed() and covers(settings, x, *rest)


def covers(
    settings: Settings, x: Tensor, scale: Tensor, zero: Tensor | float, table: Tensor | None, *inputs: Any
) -> bool:
    """Whether the operators know this grid, these shapes and this rule.

    Args:
        settings: What is constant.
        x: The input, (..., size).
        scale: Scales.
        zero: Zero points, or one number.
        table: The codebook, or None.
        inputs: The rule's tensors.
    """
    if table is not None or x.dtype not in DTYPES or not x.numel() or type(x) not in (Tensor, nn.Parameter):
        return False
    if not is_per_row(scale, x) or (isinstance(zero, Tensor) and not is_per_row(zero, x)):
        return False
    rule = settings.rule
    if type(rule) is not Pege:
        return type(rule) is Ste or (type(rule) is Ewgs and not inputs) or is_straight(rule)
    theta: Tensor = inputs[0]
    if rule.learns_sharpness:
        return False
    return is_per_row(theta, x) if theta.is_floating_point() else theta.shape == x.shape


def is_straight(rule: Estimator) -> bool:
    """Whether forward and backward are those of ``Ste``, whatever else the method does."""
    return not overrides(rule, "inputs", "assign", "decode", "edges", "blend", "gradient", "needs_bins")


def is_per_row(shared: Tensor, x: Tensor) -> bool:
    """Whether each row of ``x``, its last dimension, reads one entry, and neighbours the same or the next.

    >>> x = torch.empty(4, 3, 32)
    >>> [is_per_row(torch.empty(shape), x) for shape in ((4, 3, 1), (4, 1, 1), (1,), (1, 3, 1), (32,))]
    [True, True, True, False, False]
    """
    if shared.dtype not in DTYPES:
        return False
    if shared.numel() == 1:
        return True
    if shared.ndim != x.ndim or shared.shape[-1] != 1:
        return False
    same = next((i for i, (a, b) in enumerate(zip(shared.shape, x.shape, strict=True)) if a != b), x.ndim)
    return all(n == 1 for n in shared.shape[same:])


def quantized(
    settings: Settings,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    table: Tensor | None,
    *inputs: Tensor,
    spare: Tensor | None = None,
) -> Tensor:
    """``base.quantized`` where ``covers`` is true, by the operator."""
    y: Tensor = torch.ops.lightning_quant.fake_quantize(x, scale, *points(settings.grid, zero))
    return y


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
    """``base.gradients`` where ``covers`` is true, by the operator."""
    grid, clips, interior, _, rule = settings
    name, delta, mask = "ste", 0.0, rule.mask if isinstance(rule, Ste) else "clamp"
    own: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(rule, Ewgs):
        name, delta = "ewgs", float(rule.delta)
    elif isinstance(rule, Pege):
        name, own = "pege", inputs
    constants = name, mask, delta, clips, learns, interior
    operator = torch.ops.lightning_quant.fake_quantize_backward
    given, moved, theta = operator(grad, x, scale, *points(grid, zero), *constants, *own)
    shared = own[0] is not None and own[0].is_floating_point()
    state = (theta if shared else None, None, None) if name == "pege" else (None,) * len(inputs)
    y = quantized(settings, x, scale, zero, table, *inputs) if again else None
    return Gradients(given, moved if learns else None, state, y)


def points(grid: Grid, zero: Tensor | float) -> tuple[Tensor | None, float, int, int]:
    """Zero points or one number, lowest and highest code."""
    tensor, number = (zero, 0.0) if isinstance(zero, Tensor) else (None, float(zero))
    return tensor, number, grid.low, grid.high


class _Forward(NamedTuple):
    """Arguments of the forward: ``fixed`` is the zero point where ``zero`` is None."""

    x: Tensor
    scale: Tensor
    zero: Tensor | None
    fixed: float
    low: int
    high: int


class _Backward(NamedTuple):
    """Arguments of the backward: those of the rules, and whether the scale wants a gradient."""

    grad: Tensor
    x: Tensor
    scale: Tensor
    zero: Tensor | None
    fixed: float
    low: int
    high: int
    rule: str
    mask: str
    delta: float
    clips: bool
    learns: bool
    interior: bool
    theta: Tensor | None
    sharpness: Tensor | None
    pull: Tensor | None

    @property
    def estimator(self) -> Estimator:
        return Ste(self.mask) if self.rule == "ste" else Ewgs(self.delta) if self.rule == "ewgs" else Pege()

    def results(self, x: Tensor, scale: Tensor | None, theta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients as an operator returns them: tensors, empty where there is none to give."""
        return x, x.new_empty(0) if scale is None else scale, x.new_empty(0) if theta is None else theta


@functools.cache
def _grid(low: int, high: int) -> Grid:
    """The uniform grid with these codes."""
    return Grid((high + 1).bit_length(), narrow=low == -high)


def _forward_reference(*args: Any) -> Tensor:
    a = _Forward(*args)
    settings = Settings(_grid(a.low, a.high), True, True, False, Ste())
    return base.quantized(settings, a.x, a.scale, a.fixed if a.zero is None else a.zero, None).contiguous()


def _forward_fake(*args: Any) -> Tensor:
    x = _Forward(*args).x
    return x.new_empty(x.shape)


def _forward_cuda(*args: Any) -> Tensor:
    from lightning_quant import triton_kernels

    x, scale, *points = _Forward(*args)
    return triton_kernels.forward(x, scale, triton_kernels.Points(*points))  # type: ignore[arg-type]


def _backward_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = _Backward(*args)
    settings = Settings(_grid(a.low, a.high), a.clips, a.interior, False, a.estimator)
    own = [t for t in (a.theta, a.sharpness, a.pull) if t is not None]
    found = base.gradients(settings, a.learns, a.grad, a.x, a.scale, a.fixed if a.zero is None else a.zero, None, *own)
    given = found.x.clone(memory_format=torch.contiguous_format)  # an operator returns nothing that it was given
    return a.results(given, found.scale, found.state[0] if own else None)


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = _Backward(*args)
    moved = a.scale.new_empty(a.scale.shape, dtype=torch.float32) if a.learns else None
    theta = None if a.theta is None or not a.theta.is_floating_point() else a.theta.new_empty(a.theta.shape)
    return a.results(a.grad.new_empty(a.x.shape), moved, theta)


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from lightning_quant import triton_kernels

    a = _Backward(*args)
    grid = _grid(a.low, a.high)
    edges = grid.span(a.estimator.edges(grid)) if a.clips else None
    rule = triton_kernels.Rule(a.rule, edges, a.delta, a.theta, a.sharpness, a.pull)
    points = triton_kernels.Points(a.zero, a.fixed, a.low, a.high)
    return a.results(*triton_kernels.backward(a.grad, a.x, a.scale, points, rule, a.learns, a.interior))


def _register(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any], cuda: Any) -> None:
    """Make an operator.  Not by ``custom_op``, whose wrapper adds 15 microseconds to every call."""
    torch.library.define(f"lightning_quant::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"lightning_quant::{name}", "CompositeExplicitAutograd", reference)
    torch.library.impl(f"lightning_quant::{name}", "CUDA", cuda)
    torch.library.register_fake(f"lightning_quant::{name}", fake)


_POINTS = "Tensor x, Tensor scale, Tensor? zero, float fixed, int low, int high"
_RULE = "str rule, str mask, float delta, bool clips, bool learns, bool interior"
_THETA = "Tensor? theta, Tensor? sharpness, Tensor? pull"
_register("fake_quantize", f"({_POINTS}) -> Tensor", _forward_reference, _forward_fake, _forward_cuda)
_register(
    "fake_quantize_backward",
    f"(Tensor grad, {_POINTS}, {_RULE}, {_THETA}) -> (Tensor, Tensor, Tensor)",
    *(_backward_reference, _backward_fake, _backward_cuda),
)
