"""Inputs are compressed by a power before they are rounded: fine steps near 0, coarse ones far out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Estimator
from lightning_quant.estimators.ste import Ste

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Power(Estimator):
    """Feature quantization behind a power function, for robustness.

    Inputs: ``y = Q(f(x))``, ``f(x) = sign(x) |x|^a``, with ``f'(x) = a max(|x|, eps)^(a - 1)`` and the
    straight-through estimator for Q; the layer computes with y, which is not expanded again.  Weights: the
    straight-through estimator.

    Args:
        exponent: a, in (0, 1]; 1 is uniform rounding.
        eps: Magnitude, real, below which the slope, infinite at 0, stays that of eps.

    Source: Sun et al., "Feature Quantization for Defending Against Distortion of Images", CVPR 2018.
    Deviation: codes are clamped to the scheme's width; both defaults are ours.
    """

    about: ClassVar[About] = About("Sun et al. 2018", "", "1-8", "nothing", "w8a8-static")
    drawn: ClassVar[tuple[Any, ...]] = ({"exponent": 0.5}, {"exponent": 0.75}, {"exponent": 1.0})
    exponent: float = 0.5
    eps: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.exponent <= 1 and self.eps > 0):
            got = (self.exponent, self.eps)
            raise ValueError(explain("power", "exponent in (0, 1] and eps > 0", got, "Use 0.5 and 0.01."))

    def role(self, is_weight: bool) -> Estimator:
        """Weights are rounded as they are."""
        return Ste() if is_weight else self

    def transform(self, quantizer: FakeQuantizer, x: Tensor) -> Tensor:
        """f(x)."""
        y: Tensor = SignedPower.apply(x, self.exponent, self.eps)  # type: ignore[no-untyped-call]
        return y


class SignedPower(torch.autograd.Function):
    """``sign(x) |x|^a``, whose gradient stays finite at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exponent: float, eps: float) -> Tensor:  # type: ignore[override]
        """In float32 or wider, so that narrow inputs are rounded once."""
        ctx.save_for_backward(x)
        ctx.constants = exponent, eps
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.abs().pow_(exponent).copysign_(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """``a max(|x|, eps)^(a - 1)``."""
        (x,) = ctx.saved_tensors
        exponent, eps = ctx.constants
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        slope = wide.abs().clamp_(min=eps).pow_(exponent - 1).mul_(exponent)
        return (slope.mul_(grad).to(x.dtype), None, None)
