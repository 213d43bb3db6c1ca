"""``quantized`` and ``gradients`` in C++ on processors: one pass over memory each way, for float32.

They know what ``kernels`` cover.  PyTorch's compiler does the same arithmetic, but its kernels are called through
guards that cost as much as a small layer's rounding, and do not work in place.  Compiled once, with whatever vectors
the processor has; forward bits are those of the uncompiled arithmetic.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_quant.estimators import kernels
from lightning_quant.estimators.base import Estimator, Gradients, Settings
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.pege import Pege
from lightning_quant.grid import Grid, beyond
from lightning_quant.native import load
from lightning_quant.scratch import scratch

if TYPE_CHECKING:
    from lightning_quant.estimators.deferred import Deferred, Tensors

SOURCE, KERNELS = (Path(__file__).with_name(name) for name in ("operators.cpp", "kernels.h"))
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
VECTORS = {"avx512_f": "AVX512", "avx2": "AVX2"}  # what PyTorch's headers call them, the widest first
STRAIGHT, SCALED, SURROGATE = range(3)
REMEMBERED = 4096  # answers of ``fits``, by shape among others: batches may have any number of tokens

log = logging.getLogger(__name__)


@functools.cache
def is_built() -> bool:
    """Whether the kernels are there, compiling them if that was not done before; tells once why there are none."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    name = next((name for flag, name in VECTORS.items() if capabilities.get(flag)), None)
    if sys.platform != "linux" or name is None:
        return False
    try:
        load(SOURCE, (*FLAGS, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"), [KERNELS])
    except Exception as error:  # whatever a missing or broken compiler raises: PyTorch's compiler takes over
        cure = "pip install 'lightning-quant[runtime]' and have a C++ compiler on PATH"
        log.warning("no compiled kernels for fake quantization (%s): %s", cure, error)
        return False
    return True


def fits(
    settings: Settings, x: Tensor, scale: Tensor, zero: Tensor | float, table: Tensor | None, *inputs: Any
) -> bool:
    """Whether these do a quantizer's work: ``kernels`` cover it, in float32 and in one piece, on a processor."""
    return _fits(settings, x.shape, x, scale, zero, table, *inputs)


def quantized(
    settings: Settings,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    table: Tensor | None,
    *inputs: Tensor,
    spare: Tensor | None = None,
) -> Tensor:
    """``base.quantized``, where ``fits`` is true."""
    y = torch.empty_like(x) if spare is None else spare
    torch.ops.lightning_quant.quantize_into(y, x, scale, *kernels.points(settings.grid, zero))
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
    """``base.gradients``, where ``fits`` is true."""
    grad = grad.to(torch.float32).contiguous()
    out = torch.empty_like(x) if spare is None else grad
    y = (torch.empty_like(x) if spare is None else spare) if again else None
    rule = _rule(settings)
    constants = rule.kind, settings.clips, rule.below, rule.above, rule.delta, learns, settings.interior
    of_scale, of_theta = torch.ops.lightning_quant.gradients_into(
        out, y, grad, x, scale, *kernels.points(settings.grid, zero), *constants, *_own(rule, inputs), None
    )
    state: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if rule.kind == SURROGATE and of_theta.numel():
        state = (_gathered(of_theta, inputs[0]), *state[1:])
    return Gradients(out, _gathered(of_scale, scale) if learns else None, state, y)


def reads_rows(grid: Grid, x: Tensor) -> bool:
    """Whether ``dynamic_scale`` and ``rounded_rows`` know the grid, and the tensor is for them: as ``fits``."""
    plain = grid.levels is None and grid.scale_format == "float" and grid.zero is not None
    known = x.is_cpu and x.dtype == torch.float32 and type(x) in (Tensor, nn.Parameter)
    return plain and known and x.is_contiguous() and bool(x.numel()) and is_built()


def dynamic_scale(grid: Grid, x: Tensor) -> Tensor:
    """``grid.scale`` of the largest magnitudes along the last dimension, in one pass, where ``reads_rows`` is true."""
    return torch.ops.lightning_quant.dynamic_scale(x.detach(), grid.top)  # type: ignore[no-any-return]


def rounded_rows(grid: Grid, x: Tensor) -> Tensor:
    """``x`` rounded with ``dynamic_scale``; the gradient passes unchanged."""
    zero: Any = grid.zero
    return torch.ops.lightning_quant.rounded_rows(x, grid.top, zero, grid.low, grid.high)  # type: ignore[no-any-return]


def theta_step(
    settings: Settings,
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | float,
    table: Tensor | None,
    drawn: Tensor,
    *inputs: Tensor,
) -> Tensor:
    """``pege.stepped`` in place of a Theta in bytes, where ``fits`` is true."""
    theta, sharpness, _ = inputs
    rule: Any = settings.rule
    points = x, scale, *kernels.points(settings.grid, zero)
    grad = grad.to(torch.float32).contiguous()
    spare = scratch(x)
    spare = torch.empty_like(x) if spare is None else spare
    torch.ops.lightning_quant.theta_step(theta, spare, grad, *points, sharpness, rule.uint8_lr, drawn)
    return theta


def rounded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    way: Deferred,
    tensors: Tensors,
    inner: Deferred | None = None,
    inner_tensors: Tensors = (),
) -> Tensor | None:
    """``rounded_product`` as one node of autograd in C++, or None where these kernels do not do the work.

    Python's part of a node, a fifth of a millisecond where other work has emptied the caches, is more than the rounding
    of a layer of a million weights.

    Args:
        x: Input, (..., in).
        weight: (out, in).
        bias: (out,) or None.
        way: How the weight is rounded.
        tensors: Its tensors.
        inner: How the input is, if it is rounded here.
        inner_tensors: Its tensors.

    Returns:
        (..., out); its gradient cannot be differentiated again.
    """
    if not way.compiled or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    if not _takes(way, weight, tensors):
        return None
    x = x.contiguous()
    own = _own(_rule(way.settings), tensors[3:])
    inputs: tuple[Any, ...] = ((), None, None)
    if inner is not None:
        if not _takes(inner, x, inner_tensors) or _rule(inner.settings).kind == SURROGATE:
            return None
        inputs = (_constants(inner), *inner_tensors[:2])
    given = (x, weight, bias, _constants(way), *tensors[:2], *own, *inputs, *(way.turn or (None, None)))
    return torch.ops.lightning_quant.rounded_linear(*given)  # type: ignore[no-any-return]


def rounded_input(x: Tensor, way: Deferred, tensors: Tensors) -> Tensor | None:
    """``x`` rounded with one scale that nobody learns, straight-through; layers that read the same input share it.

    Returns:
        None where these kernels do not do that.
    """
    scale, zero, *_ = tensors
    alone = all(t is None or (t.numel() == 1 and not t.requires_grad) for t in (scale, zero))
    if not alone or not way.compiled or not _takes(way, x, tensors) or _rule(way.settings).kind != STRAIGHT:
        return None
    return torch.ops.lightning_quant.rounded_input(x, _constants(way), scale, zero)  # type: ignore[no-any-return]


def _takes(way: Deferred, x: Tensor, tensors: Tensors) -> bool:
    scale, zero, *rest = tensors
    return _fits(way.settings, way.shape, x, scale, way.zero if zero is None else zero, *rest)


def _fits(settings: Settings, shape: torch.Size, x: Tensor, *rest: Any) -> bool:
    """``fits`` of ``x`` viewed in a shape."""
    if not x.is_cpu:
        return False
    grid, clips, interior, _, rule = settings
    kinds = [(type(t), t.shape, t.dtype, t.is_contiguous()) if isinstance(t, Tensor) else t is None for t in (x, *rest)]
    key = (id(rule), id(grid), clips, interior, shape, *kinds)
    if key not in _known:  # looking closely takes longer than rounding a small layer
        given = [t for t in (x, *rest) if isinstance(t, Tensor)]
        right = all(t.is_contiguous() and t.dtype in (torch.float32, torch.uint8) for t in given)
        found = right and kernels.covers(settings, x.view(shape), *rest) and is_built()
        if len(_known) >= REMEMBERED:
            _known.clear()
        _known[key] = found, rule, grid  # objects in an entry keep their ids
    return _known[key][0]


class _Rule(NamedTuple):
    """A rule in numbers: places from ``below`` down and ``above`` up have no gradient."""

    kind: int
    below: float
    above: float
    delta: float
    rate: float


_LIMITS = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
_known: dict[Hashable, tuple[bool, Estimator, Grid]] = {}
_rules: dict[Hashable, tuple[_Rule, Estimator, Grid]] = {}


def _rule(settings: Settings) -> _Rule:
    grid, clips, _, _, rule = settings
    key = id(grid), clips, id(rule)
    if key not in _rules:
        low, high = grid.span(rule.edges(grid)) if clips else (0.0, 0.0)
        kind = SCALED if isinstance(rule, Ewgs) else SURROGATE if isinstance(rule, Pege) else STRAIGHT
        delta = float(rule.delta) if isinstance(rule, Ewgs) else 0.0
        rate = float(rule.uint8_lr) if isinstance(rule, Pege) else 0.0
        _rules[key] = _Rule(kind, -beyond(-low, *_LIMITS), beyond(high, *_LIMITS), delta, rate), rule, grid
    return _rules[key][0]


def _own(rule: _Rule, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Theta, sharpness and pull."""
    return tuple(inputs) if rule.kind == SURROGATE else (None, None, None)


def _constants(way: Deferred) -> list[float]:
    """What operators.cpp reads them as."""
    grid, clips, interior, *_ = way.settings
    rule = _rule(way.settings)
    numbers = way.shape[-1], grid.low, grid.high, rule.kind, clips, interior
    return [*map(float, numbers), way.zero, rule.below, rule.above, rule.delta, way.factor, rule.rate]


def _gathered(rows: Tensor, like: Tensor) -> Tensor:
    """Sums of rows added up for what shares an entry."""
    return (
        rows.reshape(like.numel(), -1).sum(1).reshape(like.shape)
        if rows.numel() != like.numel()
        else rows.view_as(like)
    )
