"""Formats a scale can be stored in, as pure functions that round it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

E4M3_MIN, E4M3_MAX = 2.0**-9, 448.0


def power_of_two(scale: Tensor, top: float) -> Tensor:
    """``2^ceil(log2 scale)``: the next power of two, so that nothing is clipped that was not.

    >>> power_of_two(torch.tensor([0.013, 0.03, 0.125]), 1.0)
    tensor([0.0156, 0.0312, 0.1250])
    """
    mantissa, exponent = torch.frexp(scale)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(scale > 0, torch.ldexp(torch.ones_like(scale), exponent), scale)


def e8m0(scale: Tensor, top: float) -> Tensor:
    """Microscaling's shared scale: ``2^(floor(log2 absmax) - floor(log2 top))`` with absmax = scale * top.

    Source: OCP Microscaling Formats specification v1.0, section 6.3.  Values up to twice the block's power of
    two are clipped at the top level.
    """
    absmax = scale * top
    _, exponent = torch.frexp(absmax)
    _, of_top = torch.frexp(torch.tensor(top))
    return torch.where(absmax > 0, torch.ldexp(torch.ones_like(scale), exponent - int(of_top)), absmax)


def e4m3(scale: Tensor, top: float) -> Tensor:
    """NVFP4's block scales: E4M3 numbers over one divisor per tensor.

    A scale so far below the largest that it would be rounded to 0 takes the smallest number there is.

    >>> e4m3(torch.tensor([3.3, 0.7, 0.0]), 6.0)
    tensor([3.2500, 0.6875, 0.0000])
    """
    if scale.numel() == 0:
        return scale
    divisor = e4m3_divisor(scale)
    rounded = (scale * divisor).clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).to(scale.dtype) / divisor
    return torch.where(scale > 0, rounded, scale)


def e4m3_divisor(scale: Tensor) -> Tensor:
    """The number that E4M3 scales of a tensor are divided by, 0-dim: the power of two that uses their whole range.

    **Deviation** from NVIDIA's recipe, whose divisor is 448 over the largest scale: a power of two rounds nothing, so
    that levels are the same in every order and dtype they are computed in, and can be found again in the scales.
    """
    largest = scale.amax()
    mantissa, exponent = torch.frexp(largest)
    power = torch.where(mantissa <= 0.875, 9 - exponent, 8 - exponent)  # 448 is 0.875 * 2^9
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), power), torch.ones_like(largest))


def float16(scale: Tensor, top: float) -> Tensor:
    """IEEE half precision, as GGUF's blocks store it; within its normal numbers, so that no scale vanishes.

    >>> float16(torch.tensor([0.1, 1e-9, 1e9]), 1.0)
    tensor([9.9976e-02, 6.1035e-05, 6.5504e+04])
    """
    half = torch.finfo(torch.float16)
    rounded = scale.abs().clamp(half.tiny, half.max).to(torch.float16).to(scale.dtype)
    return torch.where(scale != 0, torch.copysign(rounded, scale), scale)


SCALE_FORMATS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    "float": None,
    "pow2": power_of_two,
    "e8m0": e8m0,
    "e4m3": e4m3,
    "float16": float16,
}
