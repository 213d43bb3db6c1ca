"""A step and a real offset per block, fixed or learned (LSQ+)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_quant.distributed import fill, to_local
from lightning_quant.ranges.base import Range, formatted, step_size_factor

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Offset(Range):
    """The lowest level lies at a real offset, the others a learned step apart above it.

    ``y = s * clip(round((x - offset) / s), 0, 2^b - 1) + offset``; the straight-through estimator then has
    ``dy/ds`` = round(t) - t inside, 0 below, 2^b - 1 above, with t = (x - offset) / s, and
    ``dy/doffset`` = 0 inside, 1 outside.  Both gradients are multiplied by ``1 / sqrt(N * (2^b - 1))``, with N the
    number of elements that share the step (for activations: of one sample).

    Source: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization", CVPRW 2020, arXiv:2004.09576.
    Deviation: the step is kept above 1e-6 by a floor after each optimizer step.
    """

    affine: ClassVar[bool] = True

    def initial(self) -> Mapping[str, float]:
        """Step and offset."""
        return {"scale": 0.0, "offset": 0.0}

    def set(self, quantizer: FakeQuantizer, low: Tensor, high: Tensor) -> None:
        """The lowest level at ``low``, the highest at ``high``; step 1 where they are equal."""
        grid = quantizer.grid
        step = (high - low) / (grid.high - grid.low)
        step = torch.where(step > 0, step, torch.ones_like(step))
        fill(quantizer.scale.data, grid.format(step).reshape(quantizer.scale_shape))
        fill(quantizer.offset.data, grid.format(low).reshape(quantizer.scale_shape))

    def scale(self, quantizer: FakeQuantizer) -> Tensor:
        """The step."""
        return formatted(quantizer, quantizer.scale)

    def zero(self, quantizer: FakeQuantizer) -> float:
        """The lowest code."""
        return float(quantizer.grid.low)

    def offset(self, quantizer: FakeQuantizer) -> Tensor:
        """The level of the lowest code."""
        return formatted(quantizer, quantizer.offset)

    def ready(self, quantizer: FakeQuantizer) -> bool:
        """Steps start at 0."""
        return bool((to_local(quantizer.scale) > 0).all())

    def factor(self, quantizer: FakeQuantizer, x: Tensor) -> float:
        """See the class."""
        return step_size_factor(quantizer, x, quantizer.grid.high - quantizer.grid.low)
