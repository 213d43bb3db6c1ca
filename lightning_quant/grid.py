"""Pure functions between real values and integer codes.

``code = clamp(round(x / scale + zero), low, high)`` and ``x = (code - zero) * scale``; rounding is half to
even.  A *code* is a float tensor that holds integers, so that no pass over memory is spent on casts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def code_bounds(bits: float) -> tuple[int, int]:
    """Lowest and highest code: signed two's complement, {-1, 0, 1} for 1.58 bits, {-1, 0} for one bit.

    >>> code_bounds(4), code_bounds(1.58), code_bounds(1)
    ((-8, 7), (-1, 1), (-1, 0))
    """
    if bits == 1.58:
        return (-1, 1)
    half = 2 ** (int(bits) - 1)
    return (-half, half - 1)


def fixed_zero(bits: float) -> float:
    """Zero point of a symmetric grid, in codes: -0.5 for one bit (levels +-scale/2), else 0."""
    return -0.5 if bits == 1 else 0.0


def symmetric_scale(absmax: Tensor, bits: float) -> Tensor:
    """Scale whose highest level is ``absmax`` (one bit: whose two levels are +-absmax).

    Args:
        absmax: Largest magnitudes, real, any shape, >= 0.
        bits: Width of a code.

    Returns:
        Scales, real, same shape; 1 where ``absmax`` is 0, so that a tensor of zeros stays one.
    """
    high = code_bounds(bits)[1] - fixed_zero(bits)
    scale = absmax / high
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def reader_scale(absmax: Tensor, bits: float) -> Tensor:
    """Dynamic scale as compressed-tensors' reader in transformers computes it: absmax / ((2^b - 1) / 2)."""
    scale = absmax / ((2 ** int(bits) - 1) / 2)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def affine_scale(low: Tensor, high: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of the grid over [low, high], widened to hold 0.

    Args:
        low: Lower ends of the ranges, real.
        high: Upper ends, same shape.
        bits: Width of a code.

    Returns:
        (scale, zero): real, and integers in code units held in floats.
    """
    first, last = code_bounds(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (last - first)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.clamp(torch.round(first - low / scale), first, last)
    return scale, zero


def scale_and_zero(low: Tensor, high: Tensor, bits: float, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point unless the grid's is fixed, for a range [low, high]."""
    if symmetric:
        return symmetric_scale(torch.maximum(-low, high).clamp(min=0), bits), None
    return affine_scale(low, high, bits)


def encode(x: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int) -> Tensor:
    """Real values to codes; ``scale`` and ``zero`` broadcast against ``x``.

    >>> encode(torch.tensor([0.26, -9.0]), torch.tensor([0.25]), 0.0, -2, 1)
    tensor([ 1., -2.])
    """
    u = torch.div(x, scale)
    if isinstance(zero, Tensor) or zero:
        u = u + zero
    return torch.round_(u).clamp_(low, high) if not u.requires_grad else torch.round(u).clamp(low, high)


def decode(code: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """Codes to real values."""
    if isinstance(zero, Tensor) or zero:
        code = code - zero
    return code * scale
