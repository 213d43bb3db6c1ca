"""A weight's codes, and the weight as evaluation computes with it, part by part.

What is as large as the weight and in float exists for some rows at a time, unless the estimator assigns codes by
tensors of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_quant.distributed import whole
from lightning_quant.estimators import overrides

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

ELEMENTS = 2**18  # that are encoded at a time: float temporaries stay small, and in the processor's cache


class Blocks(NamedTuple):
    """A weight in blocks, with its range in ``scale_shape``."""

    view: Tensor
    scale: Tensor
    zero: Tensor | float
    offset: Tensor | None


def stored(q: FakeQuantizer, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | float, Tensor | None]:
    """See ``FakeQuantizer.stored``."""
    cut = blocks(q, weight)
    codes = torch.empty(cut.view.shape, dtype=torch.int8 if q.table is None else torch.int16, device=cut.view.device)
    for rows, code, _ in encoded(q, cut):
        codes[rows] = code.to(codes.dtype)
    return q.granularity.unview(codes, weight.shape), cut.scale, cut.zero, cut.offset


def on_grid(q: FakeQuantizer, weight: Tensor) -> Tensor:
    """See ``FakeQuantizer.on_grid``."""
    cut = blocks(q, weight)
    y = torch.empty(cut.view.shape, dtype=weight.dtype, device=cut.view.device)
    for rows, code, inputs in encoded(q, cut):
        own: list[Any] = [t[rows] if isinstance(t, Tensor) and len(t) == len(cut.view) else t for t in cut[1:]]
        y[rows] = q.real(code, own[0], own[1], own[2], inputs).to(weight.dtype)
    return q.granularity.unview(y, weight.shape)


def blocks(q: FakeQuantizer, weight: Tensor) -> Blocks:
    """The whole weight and its whole range, if they are sharded."""
    x = q.estimator.transform(q, whole(weight.detach()))
    scale, zero, offset = q.scale_zero_offset(x)
    zero = whole(zero) if isinstance(zero, Tensor) else zero
    offset = None if offset is None else whole(offset.detach())
    return Blocks(q.granularity.view(x), whole(scale.detach()), zero, offset)


def encoded(q: FakeQuantizer, cut: Blocks) -> Iterator[tuple[slice, Tensor, tuple[Tensor, ...]]]:
    """Rows of blocks, their codes (on a codebook places), and the tensors the estimator assigned them by."""
    view, scale, zero, offset = cut
    own = q.table is None and overrides(q.estimator, "assign", "decode")
    wide = torch.promote_types(view.dtype, torch.float32)
    step = max(len(view) if own else ELEMENTS // max(view[:1].numel(), 1), 1)

    def lifted(values: Tensor, rows: slice) -> Tensor:
        return q.granularity.lift(values[rows] if len(values) == len(view) else values)

    for start in range(0, len(view), step):
        rows = slice(start, start + step)
        part, unit = view[rows].to(wide), lifted(scale, rows)
        if offset is not None:
            part = part - lifted(offset, rows)
        u = torch.div(part, unit)
        if isinstance(zero, Tensor) or zero:
            u = u.add_(lifted(zero, rows) if isinstance(zero, Tensor) else zero)
        if q.table is not None:
            yield rows, q.grid.nearest(u, q.table), ()
            continue
        inputs = q.estimator.inputs(q, view if offset is None else part, unit) if own else ()
        yield rows, q.estimator.assign(u, q.grid, inputs, False), inputs
