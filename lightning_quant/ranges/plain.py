"""One scale per block with the plain chain rule as its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_quant.ranges.scale import Scale

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Plain(Scale):
    """The scale itself, as ``scale``, but its gradient is not multiplied by LSQ's ``1 / sqrt(N * high)``.

    Source: Faraone et al., "SYQ: Learning Symmetric Quantization For Efficient Deep Neural Networks", CVPR 2018,
    whose scales follow their gradient as it is.
    """

    def factor(self, quantizer: FakeQuantizer, x: Tensor) -> float:
        """1."""
        return 1.0
