"""DoReFa-Net: weights on a fixed grid after a tanh, inputs in [0, 1], gradients of few bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Estimator, demand
from lightning_quant.grid import Grid
from lightning_quant.noise import uniform
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Dorefa(Estimator):
    """DoReFa-Net: low-bit weights, inputs and gradients.

    See the classes of weights and inputs for their formulas.

    Args:
        gradient_bits: Width of the gradient that comes back through each layer's output, 1 to 8; None: float.
            With n = 2^k - 1, m the largest |dr| of the sample and v uniform in [-1/2, 1/2):
            ``f(dr) = 2 m (round(n (dr / (2 m) + 1/2) + v) / n - 1/2)``, whose mean over v is dr.

    Source: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
    Gradients", 2016, arXiv:1606.06160, section 2.
    Deviation: v is a function of element, layer and optimizer step, so that ranks and micro-batches of one step
    draw the same.
    """

    about: ClassVar[About] = About("Zhou et al. 2016", "1606.06160", "1-8", "nothing", "w2a2")
    gradient_bits: int | None = None

    def __post_init__(self) -> None:
        if self.gradient_bits is not None and self.gradient_bits not in WIDTHS:
            cure = "The paper uses 6 with 1-bit weights and 2-bit inputs."
            raise ValueError(explain("dorefa.gradient_bits", "None or 1 to 8", self.gradient_bits, cure))

    def role(self, is_weight: bool) -> Estimator:
        """Weights and inputs differ in everything."""
        return DorefaWeights(self.gradient_bits) if is_weight else DorefaInputs()


@dataclass(frozen=True)
class DorefaWeights(Estimator):
    """Weights: the tanh, over its largest magnitude, on the 2^k levels of [-1, 1].

    ``t = tanh(w) / max|tanh w|``, ``y = 2 round(n (t / 2 + 1/2)) / n - 1``, n = 2^k - 1;
    ``g_w = g (1 - tanh(w)^2) / max|tanh w|`` everywhere, the maximum over the layer being a constant.
    One bit: ``y = E|w| sgn(w)``, E the mean over the layer, sgn(0) = 1, and ``g_w = g``.
    """

    method: ClassVar[str] = "dorefa"
    gradient_bits: int | None = None

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """One scale per layer, taken anew at every call."""
        needs = {"granularity": "tensor", "symmetric": True, "dynamic": True, "range": "scale", "learn_scale": False}
        spec = demand(spec, where, self.method, bits=WIDTHS, **needs)
        grid, observer = ("int", "absmean") if spec.bits == 1 else ("midrise", "unit")
        return demand(spec, where, self.method, grid=grid, observer=observer)

    def state(self, quantizer: FakeQuantizer) -> None:
        """The optimizer step, which the gradient's noise is a function of."""
        if self.gradient_bits is not None:
            quantizer.track_step()

    def transform(self, quantizer: FakeQuantizer, x: Tensor) -> Tensor:
        """The tanh over its largest magnitude, in float32: a coarser dtype would move values between levels."""
        if quantizer.grid.bits == 1:
            return x
        t = torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32)))
        top = t.detach().abs().amax() if t.numel() else t.new_ones(())
        return t / top.clamp(min=torch.finfo(t.dtype).tiny)

    def edges(self, grid: Grid) -> tuple[float, float]:
        """Gradients pass everywhere."""
        return (-math.inf, math.inf)

    def output(self, quantizer: FakeQuantizer, y: Tensor) -> Tensor:
        """Quantize the gradient that comes back, in training."""
        if self.gradient_bits is None or not quantizer.training:
            return y
        step = quantizer.step.clone()
        return QuantizeGradient.apply(y, step, quantizer.salt, self.gradient_bits)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class DorefaInputs(Estimator):
    """Inputs: ``y = round(n clip(x, 0, 1)) / n``, n = 2^k - 1; ``g_x = g`` where 0 <= x <= 1, else 0.

    Made for layers behind an activation that ends at 1, such as a clipped ReLU; other inputs lose what lies beyond.
    """

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """The fixed range [0, 1]."""
        needs = {"granularity": "tensor", "symmetric": False, "dynamic": False, "grid": "int", "range": "scale"}
        return demand(spec, where, "dorefa", **needs, observer="unit", learn_scale=False)


class QuantizeGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded at random to few bits: f of ``Dorefa``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, step: Tensor, salt: int, bits: int) -> Tensor:  # type: ignore[override]
        """Pass ``y`` on."""
        ctx.save_for_backward(step)
        ctx.salt, ctx.bits = salt, bits
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Round the gradient."""
        (step,) = ctx.saved_tensors
        return round_gradient(grad, step, ctx.salt, ctx.bits), None, None, None


def round_gradient(grad: Tensor, step: Tensor, salt: int, bits: int) -> Tensor:
    """F of ``Dorefa``: unbiased rounding to 2^bits levels, with the largest magnitude of each sample as the range.

    Args:
        grad: (samples, ...), real; a vector is one sample.
        step: Optimizer step, int64, 0-dim.
        salt: Tells layers apart.
        bits: Width of a level.
    """
    if grad.numel() == 0:
        return grad
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    rows = wide.reshape(len(wide) if wide.ndim > 1 else 1, -1)
    span = 2 * rows.abs().amax(dim=1, keepdim=True)
    n = 2**bits - 1
    noise = uniform(rows.shape, step, salt).to(rows.dtype).sub_(0.5)
    level = (rows / span.clamp(min=torch.finfo(wide.dtype).tiny)).add_(0.5).mul_(n).add_(noise).round_().clamp_(0, n)
    return level.div_(n).sub_(0.5).mul_(span).reshape(grad.shape).to(grad.dtype)
