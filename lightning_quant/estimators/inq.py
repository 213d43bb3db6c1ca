"""Incremental network quantization: the largest weights are frozen on powers of two, the rest makes up for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_quant.estimators.base import About, demand
from lightning_quant.estimators.incremental import Incremental
from lightning_quant.scheme import TensorSpec


@dataclass(frozen=True)
class Inq(Incremental):
    """Incremental network quantization (INQ) on powers of two.

    Levels are {0, +-2^n2 .. +-2^n1} with ``n1 = floor(log2(4 s / 3))``, s = max |w| of the tensor, real, and
    2^(b-2) magnitudes; the share ``share(t)`` of the weights with the largest |w| is frozen:
    ``w~ = Q(w), g_w = 0`` if frozen, else ``w~ = w, g_w = g``.  Evaluation and export use Q(w) for all.

    Args:
        share: Share that is frozen, in [0, 1] of a weight tensor's elements: a number, or the fields of a
            ``Schedule``.  It has to reach 1 before the run ends.

    Source: Zhou, Yao, Guo, Xu, Chen, "Incremental Network Quantization", ICLR 2017, arXiv:1702.03044.
    Deviation: the default shares are reached after equal parts of the run; the partition takes place once the
    backward pass of the step has run at which the share has grown, and the learning rate is not reset for it (a
    scheduler's business).  Other grids, and scales per channel or group, are possible on request.
    """

    about: ClassVar[About] = About("Zhou, Yao, Guo, Xu, Chen 2017", "1702.03044", "2-6", "nothing", "w5a16")

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Powers of two, scaled once by the largest weight of the tensor."""
        spec = super().prefer(demand(spec, where, "inq", symmetric=True), is_weight, where)
        grid = "pow2" if spec.grid == "auto" else spec.grid
        granularity = "tensor" if spec.granularity == "auto" else spec.granularity
        return replace(spec, grid=grid, granularity=granularity, observer=spec.observer or "minmax")
