"""Pruning and quantization in one: small weights are clipped to 0, the rest is replaced by means over bins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Estimator, demand
from lightning_quant.estimators.ste import Ste
from lightning_quant.grid import Grid
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class ClipQ(Estimator):
    """Compression by in-parallel pruning and quantization (CLIP-Q).

    For the weights of one block (a tensor, channel or group), at every forward:

    1. the share p of its positive weights nearest to 0 becomes 0, and so does that of its negative ones;
       c+ and c- are the weights nearest to 0 that remain;
    2. [min, c-] and [c+, max] are cut into 2^b - 1 bins, even on each side and shared out by the sides' lengths;
    3. the level of a bin is the mean of the float weights in it.

    Gradients pass straight to all float weights, pruned ones too, which may come back.

    Args:
        p: Share that is clipped, in [0, 1).

    Source: Tung, Mori, "CLIP-Q: Deep Network Compression Learning by In-Parallel Pruning-Quantization", CVPR 2018.
    Deviation: that no bin holds weights of both signs, for which bins of the two sides differ a little in width, is
    our reading; p and the width are given, not searched per layer; the default of p is ours.
    """

    about: ClassVar[About] = About("Tung, Mori 2018", "", "1.58-8", "nothing", "w4a16-tensor")
    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(explain("clip_q.p", "a share in [0, 1)", self.p, "Use 0.5."))

    def role(self, is_weight: bool) -> Estimator:
        """Layer inputs are rounded straight through."""
        return self if is_weight else Ste()

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Levels follow the weights; at least two bins, one for each sign."""
        if spec.bits == 1:
            raise ValueError(explain(f"{where}: method 'clip_q'", "1.58 to 8 bits", "1 bit", "Use for example w2."))
        needs = {"grid": "int", "range": "scale", "symmetric": True, "dynamic": True, "learn_scale": False}
        spec = demand(spec, where, "clip_q", **needs, observer="minmax", narrow=False)
        return replace(spec, granularity="tensor" if spec.granularity == "auto" else spec.granularity)

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Codes in the input's shape, and the level of each code, (blocks, codes), in units of the scale."""
        with torch.no_grad():
            wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            w = wide.reshape(1, -1) if scale.numel() == 1 else wide.reshape(-1, wide.shape[-1])
            bins = quantizer.high - quantizer.low
            place, zero = self._partition(w, bins)
            table = _means(w.where(place != zero, 0.0), place, bins + 1) / scale.reshape(-1, 1)
        return place.reshape(x.shape) + quantizer.low, table

    def _partition(self, w: Tensor, bins: int) -> tuple[Tensor, Tensor]:
        """Places of the elements of each row, 0 to ``bins``, ascending; and the place of the pruned, (rows, 1)."""
        ordered = w.sort(dim=1).values
        last = w.shape[1] - 1
        below, above = (w < 0).sum(dim=1, keepdim=True), (w > 0).sum(dim=1, keepdim=True)
        nearest = (below - 1 - (below * self.p).long()).clamp_(min=0)
        first = (last + 1 - above + (above * self.p).long()).clamp_(max=last)
        low, high = ordered[:, :1], ordered[:, -1:]
        negative, positive = ordered.gather(1, nearest), ordered.gather(1, first)
        left = torch.where(below > 0, negative - low, 0.0)
        right = torch.where(above > 0, high - positive, 0.0)
        zero = torch.where(left + right > 0, left * bins / (left + right), bins / 2).round_()
        zero = torch.where(below == 0, 0, torch.where(above == 0, bins, zero.clamp(1, bins - 1)))
        down = (w - low).mul_(zero).div_(left.where(left > 0, 1.0)).floor_().minimum(zero - 1)
        up = (w - positive).mul_(bins - zero).div_(right.where(right > 0, 1.0)).floor_().minimum(bins - zero - 1)
        up = up.add_(zero + 1)
        kept_below, kept_above = (w <= negative) & (w < 0), (w >= positive) & (w > 0)
        place = torch.where(kept_below, down, torch.where(kept_above, up, zero))
        return place.nan_to_num_(0.0), zero  # a run that diverges shall say so by its loss, not by a bad index

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """Those of ``inputs``."""
        return inputs[0]

    def decode(self, code: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Means of the bins; bins without weights are no code's."""
        table = inputs[1]
        count = table.shape[1]
        low = -(count // 2)
        place = (code - low).long().reshape(table.shape[0], -1)
        return table.gather(1, place).reshape(code.shape)


def _means(w: Tensor, place: Tensor, count: int) -> Tensor:
    """Means of ``w`` by place, (rows, count), 0 where there is none; added up in float64."""
    rows = torch.arange(len(w), device=w.device).unsqueeze(1)
    at = (place.long() + rows * count).reshape(-1)
    empty = torch.zeros(len(w) * count, dtype=torch.float64, device=w.device)
    total = empty.index_add(0, at, w.reshape(-1).double())
    size = empty.index_add(0, at, torch.ones_like(at, dtype=torch.float64))
    return (total / size.clamp(min=1)).to(w.dtype).reshape(len(w), count)
