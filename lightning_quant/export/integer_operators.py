"""ONNX operators on integers alone: each takes integers with a real scale and returns integers with a real scale.

A value is ``real = scale * integer``; zero points are subtracted where integers are read (DequantizeLinear) and added
where they are stored (QuantizeLinear).  Layers give int32 sums of products, whose scale is ``scale_x * scale_w``, per
output channel where the weight's is.  They stay such sums through bias, ReLU, pooling and whatever only moves them,
until QuantizeLinear multiplies them by ``scale_x * scale_w / scale_y``, an int32 number and a shift.

A constant (a bias, the 6 of ReLU6) is rounded to the sums' scale.  Few bits make that scale coarse, and rounding then
moves several percent of the results to the next code.  So sums are first shifted left by the k bits that int32 leaves
free whatever the input is, per channel, and the constant is rounded to ``scale_x * scale_w * 2^-k``.

Sums of products are computed by PyTorch's float64 kernels on tensors that hold integers: all partial sums are below
2^31, far from 2^53, so that each is exact and their order does not matter.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2 (see ``lightning_quant.integer``), appendix A.2 and A.3.
**Deviation**: k = 0 in the paper (``headroom=False``: k <= 0, and below 0 only where a bias exceeds int32); operands of
an addition must share one scale, where the paper brings each to the output's by a multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant.export.integer_moves import MOVES, concatenate, pad
from lightning_quant.export.integer_values import Scaled, Step, Value, ends, moved, paddings
from lightning_quant.integer import fixed_point_multiplier, requantize

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def quantize(step: Step, x: Value, scale: Tensor, zero: Tensor) -> Tensor:
    """Stored integers.  Floats are the model's inputs: they are rounded here, and floats end here."""
    bounds = torch.iinfo(zero.dtype)
    if scale.numel() != 1:
        raise step.refuse("one scale per activation tensor", f"{scale.numel()}", "Train with -static.")
    if isinstance(x, Scaled):
        multiplier = fixed_point_multiplier(x.scale / scale.double())
        return requantize(x.integer, *multiplier, int(zero), bounds.min, bounds.max).long()
    assert x is not None
    return (torch.round(x / scale) + zero).clamp(bounds.min, bounds.max).long()


def dequantize(step: Step, x: Tensor, scale: Tensor, zero: Tensor) -> Scaled:
    """Integers less the zero point, with their scale: nothing is multiplied."""
    if step.settings.get("block_size"):
        raise step.refuse("a scale per tensor or channel", "one per group", "Train weights with -channel.")
    shape = [-1 if i == step.settings.get("axis", 1) else 1 for i in range(x.ndim)] if scale.numel() > 1 else []
    integer = x.long() - zero.long().reshape(shape)
    if x.dtype == torch.int64:  # of an activation, not a constant of the file
        bounds = torch.iinfo(zero.dtype)
        bound = max(bounds.max - int(zero), int(zero) - bounds.min)
    else:
        bound = int(integer.abs().max())
    return Scaled(integer, scale.double().reshape(shape), bound)


def convolution(step: Step, x: Value, weight: Value, bias: Tensor | None = None) -> Scaled:
    """Conv."""
    x, weight = step.scaled(x), step.scaled(weight)
    spatial, settings = x.integer.ndim - 2, step.settings
    ones = [1] * spatial
    sums = CONVOLUTIONS[spatial](
        F.pad(x.integer, ends(paddings(step, spatial))).double(),
        weight.integer.double(),
        None,
        settings.get("strides", ones),
        0,
        settings.get("dilations", ones),
        settings.get("group", 1),
    )
    terms = math.prod(weight.integer.shape[1:])
    scale = step.whole_scale(x) * step.line(weight, 0)
    return _layer(step, sums, scale, x.bound * weight.bound * terms, bias)


def transposed_convolution(step: Step, x: Value, weight: Value, bias: Tensor | None = None) -> Scaled:
    """ConvTranspose: the weight's scales belong to dimension 1, the same for every group."""
    x, weight = step.scaled(x), step.scaled(weight)
    spatial, settings, groups = x.integer.ndim - 2, step.settings, step.settings.get("group", 1)
    ones = [1] * spatial
    sums = TRANSPOSED[spatial](
        x.integer.double(),
        weight.integer.double(),
        None,
        settings.get("strides", ones),
        0,
        settings.get("output_padding", [0] * spatial),
        groups,
        settings.get("dilations", ones),
    )
    sums = F.pad(sums, [-n for n in ends(paddings(step, spatial))])  # padding cuts the output's ends off
    terms = weight.integer.numel() // (groups * weight.integer.shape[1])
    scale = step.whole_scale(x) * step.line(weight, 1).repeat(groups)
    return _layer(step, sums, scale, x.bound * weight.bound * terms, bias)


def _layer(step: Step, sums: Tensor, scale: Tensor, bound: int, bias: Tensor | None) -> Scaled:
    """A convolution's sums, (N, C, ...), with scales and bias per channel."""
    spatial = sums.ndim - 2
    x = step.fits(Scaled(sums.long(), _channels(scale, spatial), bound))
    return x if bias is None else with_constant(step, x, _channels(bias, spatial))


def product(step: Step, a: Value, b: Value) -> Scaled:
    """MatMul."""
    a, b = step.scaled(a), step.scaled(b)
    sums = torch.matmul(a.integer.double(), b.integer.double()).long()
    bound = a.bound * b.bound * a.integer.shape[-1]
    return step.fits(Scaled(sums, step.whole_scale(a) * step.line(b, -1), bound))


def affine(step: Step, a: Value, b: Value, c: Tensor | None = None) -> Scaled:
    """Gemm with factors of 1."""
    settings = step.settings
    if settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0:
        raise step.refuse("alpha=1 and beta=1", "others", "Run the file in onnxruntime.")
    a = moved(a, torch.t) if settings.get("transA") else a
    b = moved(b, torch.t) if settings.get("transB") else b
    sums = product(step, a, b)
    return sums if c is None else with_constant(step, sums, c)


def with_constant(step: Step, x: Scaled, constant: Tensor) -> Scaled:
    """The value plus a real constant, such as a bias."""
    x = step.finer(x, constant.double().abs())
    units = torch.round(constant.double() / x.scale).long()
    return step.fits(Scaled(x.integer + units, x.scale, x.bound + int(units.abs().max())))


def add(step: Step, a: Value, b: Value) -> Value:
    """Add: sizes; a layer's sums and its bias; two values on one grid."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not (a.is_floating_point() or b.is_floating_point()):
        return a + b
    if isinstance(a, Scaled) and isinstance(b, Tensor):
        return with_constant(step, a, b)
    if isinstance(a, Tensor) and isinstance(b, Scaled):
        return with_constant(step, b, a)
    a, b = step.scaled(a), step.scaled(b)
    if not bool((a.scale == b.scale).all()):
        got = f"scales that begin with {float(a.scale.flatten()[0]):.3g} and {float(b.scale.flatten()[0]):.3g}"
        raise step.refuse("operands on one grid", got, "Train with operators=8, which gives both one range.")
    return step.fits(Scaled(a.integer + b.integer, a.scale, a.bound + b.bound))


def relu(step: Step, x: Value) -> Scaled:
    """Relu: zero points are subtracted, so 0 is 0."""
    x = step.scaled(x)
    return replace(x, integer=x.integer.clamp(min=0))


def clip(step: Step, x: Value, low: Tensor | None = None, high: Tensor | None = None) -> Value:
    """Clip, of stored integers or, with bounds rounded to the scale, of values."""
    if isinstance(x, Tensor) and not x.is_floating_point():
        return x.clamp(None if low is None else int(low), None if high is None else int(high))
    x = step.finer(step.scaled(x))
    integer = x.integer
    for bound, limit in ((low, torch.maximum), (high, torch.minimum)):
        if bound is not None:
            integer = limit(integer, torch.round(bound.double() / x.scale).long())
    return replace(x, integer=integer)


def max_pool(step: Step, x: Value) -> Value:
    """MaxPool: the largest integer is the largest value where a window has one scale."""
    settings = step.settings
    size = settings["kernel_shape"]
    spatial = len(size)
    pads = paddings(step, spatial)
    if pads[:spatial] != pads[spatial:]:
        raise step.refuse("the same padding at both ends", pads, "Use such a layer.")
    ones = [1] * spatial
    rest = (settings.get("strides", ones), pads[:spatial], settings.get("dilations", ones))

    def pooled(t: Tensor) -> Tensor:
        y = POOLS[spatial](t.double(), size, *rest, ceil_mode=bool(settings.get("ceil_mode")))
        return y.to(t.dtype)

    if isinstance(x, Scaled):
        scale = x.scale if x.scale.numel() == 1 else _channels(step.line(x, 1), spatial)
        return replace(x, integer=pooled(x.integer), scale=scale)
    assert x is not None
    return pooled(x)


def average_pool(step: Step, x: Value) -> Scaled:
    """AveragePool: sums over windows, with the count in the scale."""
    x, settings = step.scaled(x), step.settings
    size = settings["kernel_shape"]
    spatial, ones = len(size), [1] * len(size)
    pads = paddings(step, spatial)
    if settings.get("ceil_mode") or (any(pads) and not settings.get("count_include_pad")):
        cure = "Use count_include_pad=True and ceil_mode=False."
        raise step.refuse("windows of one size", "windows that the border cuts", cure)
    count = math.prod(size)
    x = step.coarser(x, count)
    padded = F.pad(x.integer, ends(pads))
    rows = padded.reshape(-1, 1, *padded.shape[2:]).double()
    window = torch.ones(1, 1, *size, dtype=torch.float64)
    sums = CONVOLUTIONS[spatial](
        rows, window, None, settings.get("strides", ones), 0, settings.get("dilations", ones)
    ).long()
    scale = x.scale if x.scale.numel() == 1 else _channels(step.line(x, 1), spatial)
    return Scaled(sums.reshape(*padded.shape[:2], *sums.shape[2:]), scale / count, x.bound * count)


def mean(step: Step, x: Value, axes: Tensor | None = None) -> Scaled:
    """ReduceMean and GlobalAveragePool: a sum, with the count in the scale."""
    x = step.scaled(x)
    over = step.settings.get("axes", []) if axes is None else axes.tolist()
    if step.operator == "GlobalAveragePool":
        over = list(range(2, x.integer.ndim))
    over = over or list(range(x.integer.ndim))
    count = math.prod(x.integer.shape[i] for i in over)
    x = step.coarser(x, count)
    scale = x.scale
    keep = bool(step.settings.get("keepdims", 1))
    if scale.numel() > 1:
        scale = scale.expand(x.integer.shape)
        if not torch.equal(scale.amax(over), scale.amin(over)):
            cure = "Train with operators=8, which puts what is averaged on one grid."
            raise step.refuse("one scale over what is averaged", "several", cure)
        scale = scale.amax(over, keepdim=keep)
    return Scaled(x.integer.sum(over, keepdim=keep), scale / count, x.bound * count)


def _channels(t: Any, spatial: int) -> Any:
    """Numbers per channel in the shape that broadcasts against (N, C, ...)."""
    return None if t is None else t.reshape(1, -1, *[1] * spatial)


COMPUTES: dict[str, Callable[..., Value]] = {
    "Add": add,
    "AveragePool": average_pool,
    "Clip": clip,
    "Concat": concatenate,
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "DequantizeLinear": dequantize,
    "Gemm": affine,
    "GlobalAveragePool": mean,
    "MatMul": product,
    "MaxPool": max_pool,
    "Pad": pad,
    "QuantizeLinear": quantize,
    "ReduceMean": mean,
    "Relu": relu,
    "Shape": lambda step, x: torch.tensor((x.integer if isinstance(x, Scaled) else x).shape),
}

CURES = {
    "BatchNormalization": "Train with batch_norm='two_pass' or 'frozen', which folds it into the layer before it.",
    "Mul": "Products of activations have no integer form here: use ReLU or ReLU6.",
}


def apply(step: Step, values: Sequence[Value]) -> Value:
    """What a node computes.

    Raises:
        ValueError: An operator without an integer form here, or floats where integers are needed.
    """
    if step.operator in MOVES:
        return moved(values[0], lambda t: MOVES[step.operator](step, t, *values[1:]))
    if step.operator in COMPUTES:
        return COMPUTES[step.operator](step, *values)
    cure = CURES.get(step.operator, "Leave it out of the model, or run the file in onnxruntime.")
    raise step.refuse(f"one of {', '.join(sorted({*MOVES, *COMPUTES}))}", step.operator, cure)
