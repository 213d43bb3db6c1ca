"""What a run reports about its quantizers, by name.

Measured in a forward (and of the step's last one where there are several: micro-batches, activation checkpointing,
a layer called twice):

* ``error``: ``||x - y||^2 / ||x||^2``, y the quantized x.
* ``clip``: share of values at least half a step outside the outermost levels.  0 by construction, and not counted,
  where a dynamic scale covers its tensor.
* ``scale``: mean of the scales in force, real.
* ``progressive_loss``: the method's own loss term, if it has one.

Counted over an update, for weights: ``flips``, the share of codes, as evaluation assigns them, that the optimizer step
changed.  Read off the state: ``scale_drift``, the mean of ``|s / s0 - 1|`` over learned scales, s0 those at the run's
begin (a resumed run begins anew; an input's at the first report after its range was observed; of a layer with many,
some ``SAMPLE`` of them, evenly spread), and what the method names (``Estimator.metrics``).

Each rank reports its own batch, and under sharding the drift of its own part of the scales.  Figures of a whole weight
are gathered; for flips that takes one weight at a time, before and after the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_quant.distributed import like, to_local, whole
from lightning_quant.estimators.base import inside
from lightning_quant.grid import Grid

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

# Averaged apart for weights and for inputs; a mean of scales over layers would say nothing.
_BY_ROLE = ("error", "clip", "flips", "scale_drift")
_PER_LAYER = ("scale",)
SAMPLE = 1024  # of a layer's scales: a copy of all would take as much memory as one of their optimizer's states


def measure(
    quantizer: FakeQuantizer, x: Tensor, scale: Tensor, zero: Tensor | float, y: Tensor, given: Tensor
) -> dict[str, Tensor]:
    """What one forward shows.

    Args:
        quantizer: Holds grid and method.
        x: Input in blocks, less any offset, real.
        scale: Scales, real, broadcastable to ``x``.
        zero: Zero points in codes, broadcastable, or one number.
        y: What ``x`` became, real, its shape.
        given: The input with its offset, real, in any shape.

    Returns:
        0-dim tensors of 32 bits or more.
    """
    out = {
        "error": _square(x - y) / _square(given).clamp(min=1e-30),
        "clip": clipped(x, scale, zero, quantizer.grid) if quantizer.clips else scale.new_zeros(()),
        "scale": scale.to(_wide(scale)).sum() / max(scale.numel(), 1),
    }
    term = quantizer.estimator.penalty(quantizer, x, scale, zero)
    return out if term is None else {**out, "progressive_loss": term}


def clipped(x: Tensor, scale: Tensor, zero: Tensor | float, grid: Grid) -> Tensor:
    """Share of values outside ``reach(grid)``: no level is within half a step of them."""
    u = torch.div(x.to(_wide(x)), scale)
    if isinstance(zero, Tensor) or zero:
        u = u.add_(zero)
    kept = inside(u.new_ones(()).expand_as(u), u, *reach(grid)).sum()
    return (u.numel() - kept) / max(u.numel(), 1)


def reach(grid: Grid) -> tuple[float, float]:
    """The outermost levels and half a step more, in units of the scale, zero point included.

    >>> reach(Grid(4)), reach(Grid(4, kind="e2m1"))
    ((-8.5, 7.5), (-7.0, 7.0))
    """
    if grid.levels is None:
        return grid.low - 0.5, grid.high + 0.5
    return (3 * grid.levels[0] - grid.levels[1]) / 2, (3 * grid.levels[-1] - grid.levels[-2]) / 2


def codes(quantizer: FakeQuantizer, weight: Tensor) -> Tensor:
    """A weight's codes, one byte each (two on a codebook), in its shape and sharded as it is.

    Sharded weights are gathered for it, one at a time, which is a collective.
    """
    return like(quantizer.stored(weight)[0], weight)


@torch.no_grad()
def flips(then: Tensor, now: Tensor) -> Tensor:
    """Share of codes that differ, 0-dim; a collective where they are sharded."""
    return whole((then != now).sum()) / max(now.numel(), 1)


@torch.no_grad()
def learned_scales(quantizer: FakeQuantizer) -> Tensor | None:
    """A copy of some of this rank's learned scales, real; None while there are none."""
    if not quantizer.ready or quantizer.observing or not quantizer.range_parameters():
        return None
    scales = to_local(quantizer.range.scale(quantizer).detach()).flatten()
    step = -(-scales.numel() // SAMPLE) | 1  # odd: all groups of a row have their turn
    return scales[::step].to(_wide(scales), copy=True) if scales.numel() else None


@torch.no_grad()
def readings(quantizer: FakeQuantizer, starts: dict[FakeQuantizer, Tensor]) -> dict[str, Tensor]:
    """Everything known of a quantizer, 0-dim tensors.

    Args:
        quantizer: The one to read.
        starts: Scales at the run's begin; those seen for the first time are added.
    """
    out = dict(quantizer.measured)
    scales = learned_scales(quantizer)
    if scales is not None:
        out["scale_drift"] = (scales / starts.setdefault(quantizer, scales) - 1).abs().mean()
    return {**out, **{name: whole(value) for name, value in quantizer.estimator.metrics(quantizer).items()}}


def to_floats(values: Iterable[Tensor]) -> list[float]:
    """0-dim tensors as numbers, moved to the host together: the device is waited for once."""
    tensors = list(values)
    if not tensors:
        return []
    device = tensors[0].device
    numbers: list[float] = torch.stack([t.detach().to(device, torch.float32) for t in tensors]).tolist()
    return numbers


def summary(found: Mapping[FakeQuantizer, Mapping[str, float]]) -> dict[str, float]:
    """Figures of the whole model from those of its quantizers.

    Means, of weights under the metric's name and of inputs with ``input_`` before it; what a method names is one mean
    over both, its ``..._max`` the largest, and progressive losses add up.
    """
    gathered: dict[str, list[float]] = {}
    for quantizer, metrics in found.items():
        for name, value in metrics.items():
            if name not in _PER_LAYER:
                mine = name in _BY_ROLE and not quantizer.is_weight
                gathered.setdefault(f"input_{name}" if mine else name, []).append(value)
    return {name: _joined(name, values) for name, values in gathered.items()}


def _joined(name: str, values: list[float]) -> float:
    if name == "progressive_loss":
        return sum(values)
    return max(values) if name.endswith("_max") else sum(values) / len(values)


def _square(x: Tensor) -> Tensor:
    """Sum of squares: norms of rows, which cost one pass, and lose no digits as that of everything at once does."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=_wide(x))
    return norms.square().sum()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
