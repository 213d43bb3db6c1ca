"""One learned upper bound for inputs that are never negative (PACT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_quant.distributed import fill, to_local
from lightning_quant.errors import explain
from lightning_quant.ranges.base import Range

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer
    from lightning_quant.scheme import TensorSpec

SMALLEST = 1e-6


@dataclass(frozen=True)
class Clip(Range):
    """The lowest of the 2^b levels is 0 and the highest alpha, real, fixed or learned.

    ``s = alpha / (2^b - 1)``, ``y = s * round(clip(x, 0, alpha) / s)``; with a straight-through estimator
    ``g_alpha = sum g * 1[x > alpha]``: only clipped values move alpha, with no factor.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018,
    arXiv:1805.06085, eqs. 1-3.
    Deviation: at x = alpha exactly the gradient goes to x instead of alpha.  After each optimizer step alpha is kept
    at 1e-6 or more.
    """

    interior: ClassVar[bool] = False

    def check(self, spec: TensorSpec, is_weight: bool, where: str) -> None:
        """Asymmetric integers for inputs."""
        super().check(spec, is_weight, where)
        if is_weight:
            cure = "Set it in the activation's TensorSpec alone, or use method='pact'."
            raise ValueError(explain(f"{where}: range='clip'", "inputs, which it clips below at 0", "weights", cure))
        if spec.symmetric or spec.grid != "int":
            got = f"symmetric={spec.symmetric}, grid={spec.grid!r}"
            cure = "Set symmetric=False for the activations, or use method='pact'."
            raise ValueError(explain(f"{where}: range='clip'", "an asymmetric integer grid", got, cure))

    def initial(self) -> Mapping[str, float]:
        """The upper bound."""
        return {"upper": 0.0}

    def set(self, quantizer: FakeQuantizer, low: Tensor, high: Tensor) -> None:
        """The upper end; 1 where no value is positive."""
        high = torch.where(high > 0, high, torch.ones_like(high))
        fill(quantizer.upper.data, high.reshape(quantizer.scale_shape))
        self.project(quantizer)

    def scale(self, quantizer: FakeQuantizer) -> Tensor:
        """The step between two levels."""
        return quantizer.upper / (quantizer.grid.high - quantizer.grid.low)

    def zero(self, quantizer: FakeQuantizer) -> float:
        """The lowest code, so that all codes serve values from 0 on."""
        return float(quantizer.grid.low)

    def ready(self, quantizer: FakeQuantizer) -> bool:
        """The bound starts at 0."""
        return bool((to_local(quantizer.upper) > 0).all())

    def project(self, quantizer: FakeQuantizer) -> None:
        """Keep the bound positive."""
        quantizer.upper.data.clamp_(min=SMALLEST)
