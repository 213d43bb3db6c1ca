"""Uniform numbers as a pure function of (element, optimizer step, salt).

A run that resumes, a forward that activation checkpointing repeats, and every rank of a data-parallel
group draw the same numbers, with no generator to save.  The mixer is the 32-bit finalizer known as
"lowbias32" (Wellons, hash-prospector), applied to a counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniform(shape: torch.Size, step: Tensor, salt: int) -> Tensor:
    """Numbers in [0, 1) on a grid of 2^-24, float32.

    Args:
        shape: Shape of the result.
        step: Optimizer step, int64, 0-dim, on the device the result shall be on.
        salt: Tells layers apart.
    """
    index = torch.arange(shape.numel(), device=step.device)
    h = (index + step * 0x9E3779B1 + (salt & _MASK) * 0x85EBCA77) & _MASK
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    h = h ^ (h >> 16)
    return ((h >> 8).to(torch.float32) * 2.0**-24).reshape(shape)
