"""One scale per block, fixed or learned; the zero point is fixed or observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_quant.distributed import fill, to_local
from lightning_quant.ranges.base import Range, formatted, step_size_factor

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Scale(Range):
    """The scale itself; asymmetric grids keep an integer zero point beside it, which is not learned.

    A learned scale's gradient is multiplied by ``1 / sqrt(N * high)``, with N the number of elements that share
    the scale (for activations: of one sample).

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, section 2.2.
    """

    def state(self, quantizer: FakeQuantizer) -> None:
        """The scale, and the zero point of an asymmetric grid."""
        super().state(quantizer)
        if quantizer.grid.zero is None:
            quantizer.register_buffer("zero", torch.zeros_like(quantizer.scale.detach()))

    def set(self, quantizer: FakeQuantizer, low: Tensor, high: Tensor) -> None:
        """See the base class."""
        scale, zero = quantizer.grid.scale_and_zero(low, high)
        fill(quantizer.scale.data, scale.reshape(quantizer.scale_shape))
        if zero is not None:
            quantizer.zero.copy_(zero.reshape(quantizer.scale_shape))

    def scale(self, quantizer: FakeQuantizer) -> Tensor:
        """The scale, rounded to the format it is stored in with the identity as gradient."""
        return formatted(quantizer, quantizer.scale)

    def zero(self, quantizer: FakeQuantizer) -> Tensor | float:
        """The grid's, or the observed one."""
        return quantizer.zero if quantizer.grid.zero is None else quantizer.grid.zero

    def ready(self, quantizer: FakeQuantizer) -> bool:
        """Scales start at 0."""
        return bool((to_local(quantizer.scale) > 0).all())

    def factor(self, quantizer: FakeQuantizer, x: Tensor) -> float:
        """See the class."""
        grid = quantizer.grid
        return step_size_factor(quantizer, x, grid.high if grid.levels is None else grid.top)
