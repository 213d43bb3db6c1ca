"""A weight's grid, held still while codes are chosen on it, and the weight that stands for the codes afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant import zero
from lightning_quant.errors import explain
from lightning_quant.estimators import Estimator, overrides
from lightning_quant.layers import QuantLayer, is_compact


class Held:
    """A layer's weight as rows, and the grid that its quantizer has for it.

    A range that follows the weight (``dynamic``) is set by the extreme elements of each block.  These keep the values
    they have, and no other element goes beyond them: the range that is read off the rounded weight is the old one.

    Attributes:
        rows: The float weight, (rows, columns), float32 or wider; rows share no scale, groups cut them into
            ``columns / size``.
        size: Columns that share a scale.
        scale: Real, (rows or 1, groups).

    Args:
        layer: The layer.
        path: Its path, for messages.

    Raises:
        ValueError: See ``check``.
    """

    def __init__(self, layer: QuantLayer, path: str) -> None:
        check(layer, path)
        self.layer, self.path, self.q = layer, path, layer.weight_quant
        weight = layer.weight.detach()
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        view = self.q.granularity.view(weight)
        self.rows = view.reshape(len(view), -1).to(self.wide, copy=True)
        scale, zero, offset = self.q.scale_zero_offset(weight)
        self.scale = self._matrix(scale)
        self.zero = self._matrix(zero) if isinstance(zero, Tensor) else zero
        self.offset = None if offset is None else self._matrix(offset)
        self.size = self.rows.shape[1] // self.scale.shape[1]
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.pinned: Tensor | None = None
        self.refitted = False
        if self.q.spec.dynamic:
            low, high = self._ends(self._blocks(self.rows))
            self.low, self.high = (end.reshape(self.scale.shape) for end in (low, high))
            self.pinned = self._extreme(self.rows, self._wide(self.low), self._wide(self.high))

    def fits(self) -> bool:
        """Whether ranges of groups may be read off again: they are those of the weight as it is, not trained ones."""
        q = self.q
        if q.granularity.kind != "group" or q.spec.range != "scale":
            return False
        if q.spec.dynamic:
            return True
        scale, _ = q.grid.scale_and_zero(*q.observer.range(self.rows.reshape(-1, self.size).float(), q.grid))
        return torch.equal(scale.to(q.dtype).to(self.wide).reshape(self.scale.shape), self.scale)

    def refit(self, group: int, values: Tensor) -> None:
        """Read a group's range off anew.

        Args:
            group: Which.
            values: Its columns as they are now, (rows, size).
        """
        kept = values.to(self.layer.weight.dtype)  # what is pinned must be a number of the weight's dtype
        columns = slice(group * self.size, (group + 1) * self.size)
        read = kept if self.q.spec.dynamic else kept.float()
        scale, zero = self.q.grid.scale_and_zero(*self.q.observer.range(read, self.q.grid))
        self.refitted = True
        self.scale[:, group] = scale.to(self.q.dtype).to(self.wide)
        if isinstance(self.zero, Tensor) and zero is not None:
            self.zero[:, group] = zero.to(self.wide)
        self.rows[:, columns] = kept.to(self.wide)
        if self.low is not None and self.high is not None and self.pinned is not None:
            low, high = self._ends(kept.to(self.wide))
            self.low[:, group], self.high[:, group] = low, high
            self.pinned[:, columns] = self._extreme(kept.to(self.wide), low.unsqueeze(1), high.unsqueeze(1))

    def place(self, values: Tensor, columns: slice | Tensor = slice(None)) -> Tensor:
        """Where values lie on the grid, in codes and within its ends; on a codebook interpolated.

        Args:
            values: Real, (rows, number of these columns).
            columns: Which.
        """
        u = self._units(values, columns)
        if self.q.table is not None:
            return self.q.grid.place(u, self.q.table)[0]
        return u.clamp_(self.q.grid.low, self.q.grid.high)

    def nearest(self, values: Tensor, columns: slice | Tensor = slice(None)) -> Tensor:
        """Codes, float, of the nearest levels: see ``place``."""
        u = self._units(values, columns)
        if self.q.table is not None:
            return self.q.grid.nearest(u, self.q.table)
        return u.round_().clamp_(self.q.grid.low, self.q.grid.high)

    def real(self, codes: Tensor, columns: slice | Tensor = slice(None), between: bool = False) -> Tensor:
        """What evaluation computes with for these codes, real.

        Args:
            codes: (rows, number of these columns).
            columns: Which.
            between: Codes need not be integers.
        """
        grid, table = self.q.grid, self.q.table
        level = codes
        if table is not None:
            level = grid.level(codes, table) if between else grid.dequantize(codes, table)
        level = level - self._at(self.zero, columns)
        y = level * self._at(self.scale, columns)
        return y if self.offset is None else y + self._at(self.offset, columns)

    def settled(self, codes: Tensor) -> Tensor:
        """Codes, (rows, columns), with those that the rounded weight would not keep set to what it reads as."""
        return codes if self.pinned is None else self.nearest(self.real(codes))

    def steps(self) -> Tensor:
        """The scale of each weight, real, in a shape that broadcasts to ``rows``."""
        found: Tensor = self._at(self.scale, slice(None))  # type: ignore[assignment]
        return found

    def weight_of(self, rows: Tensor) -> Tensor:
        """Rows in the weight's shape and dtype."""
        q = self.q
        blocks = rows.reshape(q.granularity.view(self.layer.weight.detach()).shape)
        return q.granularity.unview(blocks, self.layer.weight.shape).to(self.layer.weight.dtype)

    @torch.no_grad()
    def write(self, codes: Tensor) -> None:
        """Let the layer's weight be what the codes stand for; its quantizer reads the same codes off it.

        Args:
            codes: (rows, columns), float.

        Raises:
            ValueError: It would not: the weight's dtype, or a range that follows the weight in another way than by
                its extremes.
        """
        if self.refitted and not self.q.spec.dynamic:
            self._tensor("scale").copy_(self.scale.reshape(self.q.scale_shape))
            if isinstance(self.zero, Tensor):
                self._tensor("zero").copy_(self.zero.reshape(self.q.scale_shape))
        before = self.layer.weight.detach().clone()
        self.layer.weight.data.copy_(self.weight_of(self._kept(self.real(codes), slice(None))))
        stored, scale, _, _ = self.q.stored(self.layer.weight)
        read = self.q.granularity.view(stored).reshape(codes.shape)
        if not (torch.equal(read.to(codes), codes) and torch.equal(self._matrix(scale), self.scale)):
            self.layer.weight.data.copy_(before)
            odd = int((read.to(codes) != codes).sum())
            got = f"{odd} of {codes.numel()} read back as others ({before.dtype}, observer={self.q.spec.observer!r})"
            cure = "Set dynamic=False on the weights' spec, or load the model in float32."
            raise ValueError(explain(f"{self.path}.weight", "codes that the rounded weight keeps", got, cure))

    def _tensor(self, name: str) -> Tensor:
        found: Tensor = getattr(self.q, name)
        return found.data

    def _matrix(self, values: Tensor) -> Tensor:
        """Numbers in ``scale_shape`` as (rows or 1, groups), a copy."""
        flat = values.detach().to(self.wide, copy=True)
        return flat.reshape(1, 1) if flat.ndim == 1 else flat

    def _blocks(self, rows: Tensor) -> Tensor:
        return rows.reshape(1 if len(self.scale) == 1 else -1, self.size if len(self.scale) > 1 else rows.numel())

    def _ends(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Real ends of each row's values, as far as a range of this grid asks for them."""
        if self.q.spec.symmetric:
            high = blocks.abs().amax(-1)
            return -high, high
        return blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)

    def _extreme(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return ((values == low) | (values == high)) & (values != 0)

    def _wide(self, ends: Tensor) -> Tensor:
        return ends.repeat_interleave(self.size, dim=1) if ends.shape[1] > 1 else ends

    def _at(self, values: Tensor | float, columns: slice | Tensor) -> Tensor | float:
        if not isinstance(values, Tensor) or values.shape[1] == 1:
            return values
        if isinstance(columns, slice):
            columns = torch.arange(self.rows.shape[1], device=values.device)[columns]
        return values[:, columns // self.size]

    def _kept(self, values: Tensor, columns: slice | Tensor) -> Tensor:
        if self.pinned is None or self.low is None or self.high is None:
            return values
        values = torch.minimum(torch.maximum(values, self._at(self.low, columns)), self._at(self.high, columns))  # type: ignore[arg-type]
        return torch.where(self.pinned[:, columns], self.rows[:, columns], values)

    def _units(self, values: Tensor, columns: slice | Tensor) -> Tensor:
        values = self._kept(values, columns)
        if self.offset is not None:
            values = values - self._at(self.offset, columns)
        u = torch.div(values, self._at(self.scale, columns))
        return u + self.zero if not isinstance(self.zero, Tensor) else u + self._at(self.zero, columns)


def check(layer: QuantLayer, path: str) -> None:
    """Refuse layers whose rounded weight is not made of their own weight by the nearest level.

    Raises:
        ValueError: With the cure.
    """
    q, where, expected = layer.weight_quant, f"{path}.weight", "a weight that is rounded as it is"
    if layer.folds:
        cure = 'Merge adapters, or round before they are added; round with batch_norm="keep".'
        raise ValueError(explain(where, expected, f"one with {type(layer.folds[0]).__name__} folded into it", cure))
    if hasattr(layer.weight, "to_local") or zero.is_partitioned(layer.weight):
        raise ValueError(explain(where, expected, "a sharded one", "Round before the model is sharded."))
    if is_compact(layer):
        raise ValueError(explain(where, expected, "one stored in a few bits", "Load the model in float."))
    check_method(q.estimator, where)
    if not q.ready:
        cure = "Load the quantizers' state, or call lightning_quant.calibration.fit_weights(model)."
        raise ValueError(explain(where, "a range", "none: attached with fit=False", cure))


def check_method(estimator: Estimator, where: str) -> None:
    """Refuse methods that do not round a weight, as it is, to the nearest level.

    Raises:
        ValueError: With the cure.
    """
    if overrides(estimator, "assign", "decode", "transform"):
        got = f"method {type(estimator).__name__.lower()!r}, which chooses codes itself"
        cure = "Round with method='ste', or one that rounds to the nearest level, such as lsq or pege."
        raise ValueError(explain(where, "a weight that is rounded as it is", got, cure))
