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
    """NVFP4's block scales: E4M3 numbers times one float32 per tensor, the largest scale / 448.

    A scale so far below the largest that it would be rounded to 0 takes the smallest number there is.
    """
    if scale.numel() == 0:
        return scale
    whole = scale.amax() / E4M3_MAX
    ratio = scale / torch.where(whole > 0, whole, torch.ones_like(whole))
    rounded = ratio.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn).to(scale.dtype) * whole
    return torch.where(scale > 0, rounded, scale)


SCALE_FORMATS: dict[str, Callable[[Tensor, float], Tensor] | None] = {
    "float": None,
    "pow2": power_of_two,
    "e8m0": e8m0,
    "e4m3": e4m3,
}
