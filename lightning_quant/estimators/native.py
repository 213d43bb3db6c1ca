"""``quantized`` and ``gradients`` in C++ on processors: one pass over memory each way, for float32.

They know what ``kernels`` cover.  PyTorch's compiler does the same arithmetic, but its kernels are called through
guards that cost as much as a small layer's rounding, and do not work in place.  Compiled once, with whatever vectors
the processor has; forward bits are those of the uncompiled arithmetic.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.estimators import kernels
from lightning_quant.estimators.base import Gradients, Settings
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.pege import Pege
from lightning_quant.grid import beyond
from lightning_quant.native import load
from lightning_quant.scratch import scratch

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
VECTORS = {"avx512_f": "AVX512", "avx2": "AVX2"}  # what PyTorch's headers call them, the widest first
STRAIGHT, SCALED, SURROGATE = range(3)

log = logging.getLogger(__name__)


@functools.cache
def is_built() -> bool:
    """Whether the kernels are there, compiling them if that was not done before; tells once why there are none."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    name = next((name for flag, name in VECTORS.items() if capabilities.get(flag)), None)
    if sys.platform != "linux" or name is None:
        return False
    try:
        load(SOURCE, (*FLAGS, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"))
    except Exception as error:  # whatever a missing or broken compiler raises: PyTorch's compiler takes over
        cure = "pip install 'lightning-quant[runtime]' and have a C++ compiler on PATH"
        log.warning("no compiled kernels for fake quantization (%s): %s", cure, error)
        return False
    return True


def fits(
    settings: Settings, x: Tensor, scale: Tensor, zero: Tensor | float, table: Tensor | None, *inputs: Any
) -> bool:
    """Whether these do a quantizer's work: ``kernels`` cover it, in float32 and in one piece, on a processor."""
    if not x.is_cpu or not kernels.covers(settings, x, scale, zero, table, *inputs):
        return False
    given = [t for t in (x, scale, zero, *inputs) if isinstance(t, Tensor)]
    right = all(t.is_contiguous() and t.dtype in (torch.float32, torch.uint8) for t in given)
    return right and is_built()


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
    grid, clips, interior, _, rule = settings
    grad = grad.to(torch.float32).contiguous()
    out = torch.empty_like(x) if spare is None else grad
    y = (torch.empty_like(x) if spare is None else spare) if again else None
    low, high = grid.span(rule.edges(grid)) if clips else (0.0, 0.0)
    below, above = -beyond(-low, *_LIMITS), beyond(high, *_LIMITS)
    kind, delta, own = STRAIGHT, 0.0, (None, None, None)
    if isinstance(rule, Ewgs):
        kind, delta = SCALED, float(rule.delta)
    elif isinstance(rule, Pege):
        kind, own = SURROGATE, inputs  # type: ignore[assignment]
    constants = kind, clips, below, above, delta, learns, interior
    of_scale, of_theta = torch.ops.lightning_quant.gradients_into(
        out, y, grad, x, scale, *kernels.points(grid, zero), *constants, *own
    )
    state: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if kind == SURROGATE and of_theta.numel():
        state = (_gathered(of_theta, inputs[0]), *state[1:])
    return Gradients(out, _gathered(of_scale, scale) if learns else None, state, y)


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


_LIMITS = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


def _gathered(rows: Tensor, like: Tensor) -> Tensor:
    """Sums of rows added up for what shares an entry."""
    return (
        rows.reshape(like.numel(), -1).sum(1).reshape(like.shape)
        if rows.numel() != like.numel()
        else rows.view_as(like)
    )
