"""A power-of-two scale whose threshold is learned in its logarithm (TQT)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_quant.distributed import fill, to_local
from lightning_quant.errors import explain
from lightning_quant.ranges.base import Range

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer
    from lightning_quant.scheme import TensorSpec

UNSET = -2048.0  # finite and exact in every dtype: before a range is set it is multiplied by 0 and added


@dataclass(frozen=True)
class Log2(Range):
    """The scale is ``s = 2^ceil(t) / 2^(b-1)``, with t the base-2 logarithm of the threshold.

    The gradient passes the rounding up unchanged: ``dy/dt = s * ln 2 * dy/ds``, with dy/ds = round(x/s) - x/s inside
    the range, the lowest code below it and the highest above it (straight-through estimator).

    Source: Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of
    Deep Neural Networks", MLSys 2020, arXiv:1903.08066.
    Deviation: signed grids only.
    """

    def check(self, spec: TensorSpec, is_weight: bool, where: str) -> None:
        """Symmetric integers of 2 to 8 bits."""
        super().check(spec, is_weight, where)
        cure = "Use range='scale', or a symmetric integer grid of 2 to 8 bits."
        if not spec.symmetric:
            raise ValueError(explain(f"{where}: range='log2'", "a symmetric grid", "an asymmetric one", cure))
        if spec.grid != "int" or spec.bits in (1, 1.58):
            got = f"grid={spec.grid!r} of {spec.bits:g} bits"
            raise ValueError(explain(f"{where}: range='log2'", "integers of 2 to 8 bits", got, cure))

    def initial(self) -> Mapping[str, float]:
        """The logarithm of the threshold."""
        return {"log2_threshold": UNSET}

    def set(self, quantizer: FakeQuantizer, low: Tensor, high: Tensor) -> None:
        """The threshold at the largest magnitude; at 1 where that is 0."""
        absmax = torch.maximum(-low, high).clamp(min=0)
        threshold = torch.where(absmax > 0, absmax, torch.ones_like(absmax))
        fill(quantizer.log2_threshold.data, threshold.log2().reshape(quantizer.scale_shape))

    def scale(self, quantizer: FakeQuantizer) -> Tensor:
        """An exact power of two; the identity stands for the rounding up in the gradient."""
        t = quantizer.log2_threshold
        fixed = t.detach()
        power = torch.ldexp(torch.ones_like(fixed), fixed.ceil() - (int(quantizer.grid.bits) - 1))
        return power * (1 + math.log(2) * (t - fixed))

    def zero(self, quantizer: FakeQuantizer) -> float:
        """0."""
        return 0.0

    def ready(self, quantizer: FakeQuantizer) -> bool:
        """Logarithms start far below those of all numbers."""
        return bool((to_local(quantizer.log2_threshold) > UNSET / 2).all())
