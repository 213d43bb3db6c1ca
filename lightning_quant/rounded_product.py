"""A Linear layer's product that rounds its operands in passing, and once more in backward.

Of all that quantization makes, nothing is kept for backward: saved are the float input and the float weight, as the
float layer saves them.  It is one operation for autograd, so a layer costs its product and the quantizers' arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant import zero
from lightning_quant.estimators import Deferred, native
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.scratch import scratch

PLAIN = (Tensor, torch.nn.Parameter)  # no sharded ones, whose blocks lie elsewhere
FIRST = 6  # of the tensors among the arguments


def rounded_product(
    layer: Any, x: Tensor, made: Tensor | None = None, again: Callable[[], Tensor] | None = None
) -> Tensor | None:
    """The output of a Linear layer with quantizers, or None where rounding is more than arithmetic on blocks.

    Args:
        layer: Has ``weight`` (out, in), ``bias``, ``weight_quant`` and ``input_quant``.
        x: Its input, (..., in); with ``made`` one that is rounded already.
        made: What stands for its weight, (out, in), made by other operations.
        again: Makes that once more, so that it need not be kept for backward.

    Returns:
        (..., out).
    """
    weight, of_input = (layer.weight, layer.input_quant) if made is None else (made, None)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if type(x) not in PLAIN or type(weight) not in PLAIN or zero.is_partitioned(weight):
        return None
    rounder: Any = layer.weight_quant  # or a rounding's, while it looks for codes
    own = rounder.deferred(weight) if isinstance(rounder, FakeQuantizer) else None
    if own is None:
        return None
    inner = None
    if of_input is not None:
        if isinstance(of_input, FakeQuantizer) and not of_input.stateless:
            inner = of_input.deferred(x)
        if inner is not None and (y := native.rounded_input(x, *inner)) is not None:
            x, inner = y, None
        elif inner is None:  # among others what layers with the same input share
            x = of_input(x)
    (way, tensors), (inner_way, inner_tensors) = own, inner or (None, ())
    if again is None:
        y = native.rounded_linear(x, weight, layer.bias, way, tensors, inner_way, inner_tensors)
        if y is not None:
            return y
    arguments = (x, weight, layer.bias, again, way, inner_way, *tensors, *inner_tensors)
    return _RoundedProduct.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _RoundedProduct(torch.autograd.Function):
    """``F.linear`` of rounded operands."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        again: Callable[[], Tensor] | None,
        way: Deferred,
        inner: Deferred | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """The product.

        Args:
            ctx: Autograd's.
            x: Input, (..., in).
            weight: (out, in).
            bias: (out,) or None.
            again: Makes the weight once more.
            way: How the weight is rounded.
            inner: How the input is, if it is here.
            tensors: Those of the weight's rounding, then those of the input's.
        """
        n = way.size
        ctx.save_for_backward(x, weight if again is None else None, *tensors)
        ctx.again, ctx.way, ctx.inner, ctx.bias = again, way, inner, None if bias is None else bias.dtype
        rounded = x if inner is None else inner.quantized(x, tensors[n:])
        y = F.linear(rounded, way.quantized(weight, tensors[:n], scratch(weight)), bias)
        return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return] # what comes next may work in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Gradients of the input, the weight, the bias and of what their rounding learns."""
        x, weight, *tensors = ctx.saved_tensors
        weight = weight if ctx.again is None else ctx.again()
        way, inner, wanted = ctx.way, ctx.inner, ctx.needs_input_grad
        n = way.size
        own, inputs = tuple(tensors[:n]), tuple(tensors[n:])
        of_input, of_weight = wanted[0] or any(wanted[FIRST + n :]), wanted[1] or any(wanted[FIRST : FIRST + n])
        grad_x = grad_w = grad_bias = y = None
        found: tuple[Tensor | None, ...] = (None,) * n
        inner_found: tuple[Tensor | None, ...] = (None,) * len(inputs)
        flat = grad.flatten(0, -2)
        if of_weight:
            rounded = x if inner is None else inner.quantized(x, inputs)
            grad_w = (flat.T @ rounded.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
            del rounded
            if of_input and not torch.is_grad_enabled():
                memory = scratch(weight)
                grad_w, found, y = way.gradients_and_quantized(grad_w, weight, own, wanted[FIRST], memory)
            else:
                grad_w, found = way.gradients(grad_w, weight, own, wanted[FIRST])
        if of_input:
            y = way.quantized(weight, own, scratch(weight)) if y is None else y
            grad_x = (grad @ y.to(grad.dtype)).to(x.dtype)
            if inner is not None:
                grad_x, inner_found = inner.gradients(grad_x, x, inputs, wanted[FIRST + n])
        if wanted[2]:
            grad_bias = flat.sum(0).to(ctx.bias)
        return (grad_x, grad_w, grad_bias, None, None, None, *found, *inner_found)
