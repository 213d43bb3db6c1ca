"""Two ends per block, fixed or learned (DSQ, EWGS)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_quant.distributed import fill, to_local
from lightning_quant.ranges.base import Range

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

SMALLEST = 1e-6


@dataclass(frozen=True)
class Bounds(Range):
    """The lowest level lies at l and the highest at u, both real and learned.

    ``s = (u - l) / (2^b - 1)``, ``y = l + s * clip(round((x - l) / s), 0, 2^b - 1)``; with D the estimator's dQ/dx
    and Q the level (DSQ: the soft staircase) the gradients are
    ``dy/du = ((Q - l) - D (x - l)) / (u - l)``, ``dy/dl = ((u - Q) - D (u - x)) / (u - l)`` inside the range; above
    it 1 and 0, below it 0 and 1.

    Source: Gong et al., "Differentiable Soft Quantization", ICCV 2019, arXiv:1908.05033; Lee, Kim, Ham,
    "Network Quantization with Element-wise Gradient Scaling", CVPR 2021, arXiv:2104.00903.
    Deviation: after each optimizer step u is kept above l by at least 1e-6.
    """

    affine: ClassVar[bool] = True

    def initial(self) -> Mapping[str, float]:
        """Both ends."""
        return {"lower": 0.0, "upper": 0.0}

    def set(self, quantizer: FakeQuantizer, low: Tensor, high: Tensor) -> None:
        """The ends themselves; a step of 1 where they are equal."""
        span = float(quantizer.grid.high - quantizer.grid.low)
        high = torch.where(high > low, high, low + span)
        fill(quantizer.lower.data, low.reshape(quantizer.scale_shape))
        fill(quantizer.upper.data, high.reshape(quantizer.scale_shape))
        self.project(quantizer)

    def scale(self, quantizer: FakeQuantizer) -> Tensor:
        """The step between two levels."""
        return (quantizer.upper - quantizer.lower) / (quantizer.grid.high - quantizer.grid.low)

    def zero(self, quantizer: FakeQuantizer) -> float:
        """The lowest code."""
        return float(quantizer.grid.low)

    def offset(self, quantizer: FakeQuantizer) -> Tensor:
        """The lower end."""
        return quantizer.lower

    def ready(self, quantizer: FakeQuantizer) -> bool:
        """Both ends start at 0."""
        return bool((to_local(quantizer.upper) > to_local(quantizer.lower)).all())

    def project(self, quantizer: FakeQuantizer) -> None:
        """Keep u above l; in a coarse dtype by more than it could round away."""
        lower, upper = quantizer.lower.data, quantizer.upper.data
        gap = SMALLEST + 2 * torch.finfo(lower.dtype).eps * lower.abs()
        upper.copy_(torch.maximum(upper, lower + gap))
