"""Arithmetic on integers alone, as runtimes without floats compute quantized layers.

With ``real = scale * (code - zero)`` for inputs x, weights w and outputs y, a layer is

    accumulator = sum (code_x - zero_x) * code_w + round(bias / (scale_x * scale_w))        int32
    code_y      = zero_y + round(M * accumulator),  M = scale_x * scale_w / scale_y

and M, a real number, is an int32 and a shift: ``M = M0 * 2^-31 * 2^-n``, M0 * 2^-31 in [1/2, 1).

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018, arXiv:1712.05877, sections 2.2, 2.4 and 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quant.errors import explain

WORD = 31
LARGEST = 2.0**30


def fixed_point_multiplier(m: Tensor) -> tuple[Tensor, Tensor]:
    """Positive real factors as (M0, n), both int32 of the same shape: ``m = M0 * 2^-31 * 2^-n``.

    Args:
        m: Factors, real, in (0, 2^30); those of layers are below 1.

    Raises:
        ValueError: A factor outside.

    >>> fixed_point_multiplier(torch.tensor([0.0003], dtype=torch.float64))
    (tensor([1319413953], dtype=torch.int32), tensor([11], dtype=torch.int32))
    """
    m = m.double()
    if not bool(((m > 0) & (m < LARGEST)).all()):
        got = f"values in [{float(m.min()):g}, {float(m.max()):g}]"
        raise ValueError(
            explain("fixed_point_multiplier", "factors in (0, 2^30)", got, "Scales are positive: calibrate first.")
        )
    mantissa, exponent = torch.frexp(m)
    m0 = torch.round(mantissa * 2.0**WORD).to(torch.int64)
    full = m0 == 2**WORD  # rounded up to 1, which is 1/2 of the next power
    m0, exponent = torch.where(full, m0 >> 1, m0), torch.where(full, exponent + 1, exponent)
    return m0.to(torch.int32), -exponent.to(torch.int32)


def requantize(
    accumulator: Tensor, m0: Tensor, shift: Tensor, zero: int | Tensor = 0, low: int = -128, high: int = 127
) -> Tensor:
    """Output codes of accumulators: ``clamp(zero + round(M * accumulator), low, high)`` without any float.

    The product is held in 64 bits and rounded once, half up.

    Args:
        accumulator: int32.
        m0: M0 of ``fixed_point_multiplier``, broadcastable.
        shift: n, likewise.
        zero: The output's zero point, in codes.
        low: Lowest output code.
        high: Highest output code.

    Returns:
        Codes, int32.

    >>> requantize(torch.tensor([1000, -1000], dtype=torch.int32), *fixed_point_multiplier(torch.tensor(0.0126)), 3)
    tensor([ 16, -10], dtype=torch.int32)
    """
    by = shift.to(torch.int64) + WORD
    product = accumulator.to(torch.int64) * m0.to(torch.int64)  # below 2^62, so that larger shifts leave nothing
    by, product = by.clamp(max=62), torch.where(by > 62, 0, product)
    rounded = (product + (torch.ones_like(by) << (by - 1))) >> by
    return (rounded + zero).clamp(low, high).to(torch.int32)


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-5,
    axis: int = 0,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that also does the batch normalization after it.

    ``w' = gamma * w / sqrt(var + eps)``, ``b' = beta + gamma * (b - mean) / sqrt(var + eps)``.

    Args:
        weight: The layer's weight.
        bias: Its bias, or None.
        gamma: The normalization's weight, one number per output channel, as all that follow.
        beta: Its bias.
        mean: Running mean.
        var: Running variance.
        eps: Its eps.
        axis: The weight's output-channel dimension.
        groups: Of a grouped transposed convolution, whose weight (in, out / groups, ...) holds each group's outputs in
            that group's rows; 1 elsewhere.
    """
    factor = gamma / torch.sqrt(var + eps)
    old = torch.zeros_like(mean) if bias is None else bias
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    if groups == 1:
        folded = weight * factor.reshape(shape)
    else:
        grouped = weight.reshape(groups, -1, *weight.shape[1:]) * factor.reshape(groups, *shape)
        folded = grouped.reshape(weight.shape)
    return folded, beta + (old - mean) * factor
