"""Fake quantization on GPUs in one pass over memory each way, with all reductions inside it.

A tensor is seen as rows, its last dimension, of which each reads one scale and one zero point; what it owes to the
gradients of those is summed inside the kernel, in an order that never changes.  Arithmetic is float32, whatever comes
in and goes out.  The formulas, and the reference these are tested against, are ``estimators.base.quantized`` and
``gradients`` with the rules of ``Ste``, ``Ewgs`` and ``Pege``; ``estimators.operators`` makes operators of both.

Imported only where Triton is installed and a tensor asks for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_quant.grid import beyond

TILE = 1024  # elements of a program's tile, and at most its columns
ALL = 2**31 - 1  # rows that read one entry, where there is but one: the same whatever the batch, or it would recompile
SHIFT = tl.constexpr(1.5 * 2**23)  # a float32 of this size has no bits for fractions: adding it rounds half to even
NEGLIGIBLE = tl.constexpr(4 * 2.0**-23)  # see pege._Surrogate


class Points(NamedTuple):
    """Where codes lie: zero points per row (or one number for all), lowest and highest code."""

    zero: Tensor | None
    fixed: float
    low: int
    high: int


class Rule(NamedTuple):
    """A gradient: ``ste``, ``ewgs`` with its delta, or ``pege`` with its tensors; ``edges``: where gradients end.

    Attributes:
        name: One of the three.
        edges: In code units; None: nowhere.
        delta: Of ewgs.
        theta: PEGE's b, one per row or run of rows, or its uint8 codes in the input's shape.
        sharpness: PEGE's k, 0-dim.
        pull: What PEGE's distance to the grid is multiplied with, 0-dim.
    """

    name: str
    edges: tuple[float, float] | None
    delta: float = 0.0
    theta: Tensor | None = None
    sharpness: Tensor | None = None
    pull: Tensor | None = None


def forward(x: Tensor, scale: Tensor, points: Points) -> Tensor:
    """``(clamp(round(x / scale + zero)) - zero) * scale``, contiguous, with the bits of the plain arithmetic.

    Only a zero may differ from it, in its sign.

    Args:
        x: Float32, float16 or bfloat16, (..., size).
        scale: One per row or run of rows, or one.
        points: See the class.
    """
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, size, tile, grid = _tiles(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _forward[grid](x, y, *_levels(points, scale, rows), rows, _is_offset(points), size, *tile)
    return y


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, points: Points, rule: Rule, learns: bool, interior: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of input, scale and theta.

    Args:
        grad: Gradient of the output.
        x: See ``forward``, as ``scale`` and ``points``.
        scale: As there.
        points: As there.
        rule: See the class.
        learns: Whether the scale wants a gradient.
        interior: Whether values inside the range move the scale.

    Returns:
        The input's in the dtype of ``grad``, contiguous; the scale's in float32 and theta's in its own dtype, or None
        for those that want none.
    """
    x, grad = x.contiguous(), grad.contiguous()
    given = torch.empty(x.shape, dtype=grad.dtype, device=x.device)
    rows, size, tile, grid = _tiles(x)
    shares = rule.theta is not None and rule.theta.is_floating_point()
    of_scale = torch.empty(rows, dtype=torch.float32, device=x.device) if learns else None
    of_theta = torch.empty(rows, dtype=torch.float32, device=x.device) if shares else None
    theta = None if rule.theta is None else rule.theta.contiguous()
    below, above = _outside(rule.edges)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _backward[grid](
            *(grad, x, given, *_levels(points, scale, rows)),
            *(theta, rule.sharpness, rule.pull, of_scale, of_theta),
            *(below, above, rule.delta / (points.high - points.low)),
            *(rows, _span(rule.theta, rows), _is_offset(points)),
            *(rule.name, rule.edges is not None, learns, interior, shares),
            *(size, *tile),
        )
    moved = None if of_scale is None else _joined(of_scale, scale)
    return given, moved, None if of_theta is None or theta is None else _joined(of_theta, theta).to(theta.dtype)


def _tiles(x: Tensor) -> tuple[int, int, tuple[int, int], tuple[int]]:
    """Rows, their size, the tile's shape and the number of programs."""
    size = x.shape[-1]
    rows = x.numel() // size
    columns = min(triton.next_power_of_2(size), TILE)
    return rows, size, (TILE // columns, columns), (triton.cdiv(rows, TILE // columns),)


def _levels(points: Points, scale: Tensor, rows: int) -> tuple[object, ...]:
    """What both kernels want to know of the grid."""
    zero = None if points.zero is None else points.zero.contiguous()
    numbers = points.fixed, float(points.low), float(points.high)
    return scale.contiguous(), zero, *numbers, _span(scale, rows), _span(zero, rows)


def _span(shared: Tensor | None, rows: int) -> int:
    """How many neighbouring rows read one entry."""
    if shared is None or shared.numel() > rows:
        return 1
    return ALL if shared.numel() == 1 else rows // shared.numel()


def _is_offset(points: Points) -> bool:
    return points.zero is not None or points.fixed != 0


def _outside(edges: tuple[float, float] | None) -> tuple[float, float]:
    """The float32 numbers nearest to the range on its outside, as ``estimators.base.inside`` has them."""
    if edges is None:
        return 0.0, 0.0
    eps, tiny = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
    return -beyond(-edges[0], eps, tiny), beyond(edges[1], eps, tiny)


def _joined(sums: Tensor, like: Tensor) -> Tensor:
    """Sums per row to sums per entry of ``like``, in its shape."""
    if sums.numel() != like.numel():
        sums = sums.view(like.numel(), -1).sum(dim=1)
    return sums.view(like.shape)


@triton.jit
def _grid_values(first, scale_ptr, zero_ptr, fixed, rows, scale_span, zero_span, ROWS: tl.constexpr):
    """The rows' places in memory, which of them exist, and their scales and zero points, (ROWS, 1)."""
    row = tl.arange(0, ROWS)[:, None]
    live = first + row < rows
    scale = tl.load(scale_ptr + (first + row) // scale_span, mask=live, other=1.0).to(tl.float32)
    if zero_ptr is None:
        zero = tl.zeros_like(scale) + fixed
    else:
        zero = tl.load(zero_ptr + (first + row) // zero_span, mask=live, other=0.0).to(tl.float32)
    return row, live, scale, zero


@triton.jit
def _position(x, scale, zero, OFFSET: tl.constexpr):
    """Place in code units.  The division is the exact one, or ties would not stay ties."""
    u = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if OFFSET:
        u += zero
    return u


@triton.jit
def _clamped(u, low, high):
    return tl.clamp(u, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x_ptr, y_ptr, scale_ptr, zero_ptr, fixed, low, high, scale_span, zero_span, rows,
    OFFSET: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, live, scale, zero = _grid_values(first, scale_ptr, zero_ptr, fixed, rows, scale_span, zero_span, ROWS)
    x_ptr += first * SIZE
    y_ptr += first * SIZE
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        there, at = live & (column < SIZE), row * SIZE + column
        u = _position(tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32), scale, zero, OFFSET)
        y = (_clamped(u, low, high) + SHIFT) - SHIFT
        if OFFSET:
            y -= zero
        tl.store(y_ptr + at, (y * scale).to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    g_ptr, x_ptr, given_ptr, scale_ptr, zero_ptr, fixed, low, high, scale_span, zero_span,
    theta_ptr, sharpness_ptr, pull_ptr, of_scale_ptr, of_theta_ptr,
    below, above, strength, rows, theta_span,
    OFFSET: tl.constexpr, RULE: tl.constexpr, CLIPS: tl.constexpr, LEARNS: tl.constexpr, INTERIOR: tl.constexpr,
    SHARES: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, live, scale, zero = _grid_values(first, scale_ptr, zero_ptr, fixed, rows, scale_span, zero_span, ROWS)
    g_ptr += first * SIZE
    x_ptr += first * SIZE
    given_ptr += first * SIZE
    if RULE == "pege":
        sharpness = tl.load(sharpness_ptr).to(tl.float32)
        top = 2 * tl.sigmoid(sharpness) - 1  # tanh(k / 2)
        pull = scale * tl.load(pull_ptr).to(tl.float32)
        if SHARES:
            b = tl.load(theta_ptr + (first + row) // theta_span, mask=live, other=0.0).to(tl.float32)
        else:
            theta_ptr += first * SIZE
    scale_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    theta_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        there, at = live & (column < SIZE), row * SIZE + column
        g = tl.load(g_ptr + at, mask=there, other=0.0).to(tl.float32)
        u = _position(tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32), scale, zero, OFFSET)
        kept = g
        if CLIPS:
            kept = tl.where((u <= below) | (u >= above), 0.0, g)
        place = _clamped(u, low, high)
        code = (place + SHIFT) - SHIFT
        given = kept
        task = kept
        if RULE == "ewgs":
            given = kept + (place - code) * tl.abs(kept) * strength
            task = given
        if RULE == "pege":
            if not SHARES:
                b = tl.load(theta_ptr + at, mask=there, other=0).to(tl.float32) * (1 / 255)
            error = place - code
            r = error - tl.where(error < 0, -0.5, 0.5)
            sigmoid = tl.sigmoid(r * (2 * sharpness))
            slope = (sigmoid - sigmoid * sigmoid) * (2 * sharpness / top * b) + (1 - b)
            gap = (sigmoid - 0.5) * (1 / top) - r
            error += gap * b
            error = tl.where(tl.abs(error) <= NEGLIGIBLE, 0.0, error)
            total = kept + error * pull
            given = total * slope
            task = kept * slope
            if SHARES:
                theta_sum += tl.where(there, total * gap, 0.0)
        tl.store(given_ptr + at, given.to(given_ptr.dtype.element_ty), mask=there)
        if LEARNS:
            if not INTERIOR:
                code = place
            if OFFSET:
                code -= zero
                u -= zero
            scale_sum += g * code - task * u
    place = first + tl.arange(0, ROWS)
    if LEARNS:
        tl.store(of_scale_ptr + place, tl.sum(scale_sum, axis=1), mask=place < rows)
    if SHARES:
        theta_of_rows = tl.sum(theta_sum * scale, axis=1)
        tl.store(of_theta_ptr + place, theta_of_rows, mask=place < rows)
