"""Which elements of a tensor share one scale: shapes, and the views that make broadcasting trivial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_quant.errors import AttachError


@dataclass(frozen=True)
class Granularity:
    """One of tensor, channel, group, pixel, token.

    Weights are viewed as rows, one per output channel: (out, n) with scales (out, 1) for ``channel`` and
    (1,) for ``tensor``; (out, G, size) with scales (out, G) for ``group``; (K, out * in) with scales (K, 1) for
    ``pixel``, K the places of a convolution's kernel (weights without one: as ``channel``).  Activations keep
    their shape, with scales (1,) for ``tensor`` and (..., 1) for ``token``; ``group`` cuts their last dimension into
    (..., G, size) with scales (..., G, 1).

    Args:
        kind: tensor, channel, group, pixel or token.
        axis: A weight's output-channel dimension (1 for transposed convolutions and GPT-2's Conv1D);
            None for activations.
        group_size: Elements per scale along a row.
        stacked: The weight is a stack of matrices (experts) along its first dimension: each has rows of its own.
    """

    kind: str
    axis: int | None = 0
    group_size: int = 0
    stacked: bool = False

    def scale_shape(self, shape: Sequence[int], where: str = "tensor") -> tuple[int, ...]:
        """Shape of the scales of a tensor of this shape; refuses a group size that does not divide."""
        if self.kind in ("tensor", "token") or self.axis is None:
            return (1,)
        if self._by_place(shape):
            return (math.prod(shape[2:]), 1)
        out, row = self.rows(shape)
        if self.kind != "group":
            return (out, 1)
        self.check_row(row, where)
        return (out, row // self.group_size)

    def check_row(self, row: int, where: str) -> None:
        """Refuse a group size that does not divide this many elements."""
        if row % self.group_size:
            fits = [g for g in (128, 64, 32, 16, 8) if row % g == 0]
            hint = f"Use group_size={fits[0]}, or" if fits else "Use granularity='channel', or"
            raise AttachError(
                f"{where}: expected a group size that divides the row, got group_size={self.group_size} "
                f"does not divide in_features={row}. {hint} exclude it with "
                f'LayerRule(match="*.{where.rsplit(".", 1)[-1]}", weight=None).'
            )

    def rows(self, shape: Sequence[int]) -> tuple[int, int]:
        """A weight's output channels and the elements of each."""
        out = shape[self.axis or 0] * (shape[0] if self.stacked else 1)
        return out, math.prod(shape) // max(out, 1)

    def _by_place(self, shape: Sequence[int]) -> bool:
        return self.kind == "pixel" and len(shape) > 2 and not self.stacked

    def view(self, x: Tensor) -> Tensor:
        """The tensor in the shape that ``lift``-ed scales broadcast against (no copy when axis is 0)."""
        if self.axis is None:
            return x if self.kind != "group" else x.reshape(*x.shape[:-1], -1, self.group_size)
        if self.stacked:
            rows = x.movedim(self.axis, 1).flatten(0, 1)
        else:
            rows = x.movedim(self.axis, 0) if self.axis else x
        if self.kind == "group":
            return rows.reshape(rows.shape[0], -1, self.group_size)
        if self._by_place(x.shape):
            return rows.flatten(2).movedim(2, 0).flatten(1)
        return rows.reshape(rows.shape[0], -1)

    def unview(self, y: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo ``view`` (and any further cutting of rows) for a tensor whose original shape was ``shape``."""
        if self.axis is None:
            return y if self.kind != "group" else y.reshape(tuple(shape))
        if self._by_place(shape):
            out = shape[self.axis]
            y = y.reshape(len(y), out, -1).movedim(0, 2)
        if not self.axis:
            return y.reshape(tuple(shape))
        if self.stacked:
            rest = [n for i, n in enumerate(shape) if i not in (0, self.axis)]
            return y.reshape(shape[0], shape[self.axis], *rest).movedim(1, self.axis)
        moved = [shape[self.axis], *(n for i, n in enumerate(shape) if i != self.axis)]
        return y.reshape(moved).movedim(0, self.axis)

    def lift(self, scale: Tensor) -> Tensor:
        """Scales in the shape that broadcasts against ``view``."""
        return scale.unsqueeze(-1) if self.kind == "group" and self.axis is not None else scale

    def flat(self, x: Tensor) -> Tensor:
        """Rows of elements that share a scale, (number of scales, elements each), for observers."""
        if self.kind == "tensor":
            return x.reshape(1, -1)
        viewed = self.view(x)
        return viewed.reshape(-1, viewed.shape[-1])
