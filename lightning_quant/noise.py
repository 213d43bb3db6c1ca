"""Uniform numbers as a pure function of (element, optimizer step, salt).

A run that resumes, a forward that activation checkpointing repeats, and every rank of a data-parallel
group draw the same numbers, with no generator to save.  The mixer is the 32-bit finalizer known as
"lowbias32" (Wellons, hash-prospector), applied to a counter.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_STEP, _SALT = 0x9E3779B1, 0x85EBCA77
_UNMIXED = _SALT * pow(_STEP, -1, 2**32) & _MASK


def uniform(shape: torch.Size, step: Tensor, salt: int = 0) -> Tensor:
    """Numbers in [0, 1) on a grid of 2^-24, float32.

    Args:
        shape: Shape of the result.
        step: Optimizer step, int64, 0-dim, on the device the result shall be on.
        salt: Tells layers apart.
    """
    count = shape.numel()
    index = torch.arange(count, dtype=torch.int32 if count < 2**31 else torch.int64, device=step.device)
    start = (step * _STEP + (salt & _MASK) * _SALT) & _MASK
    # In int32, whose products wrap as meant: a third of the time and half of the memory of int64.
    h = index.to(torch.int32).add_(_signed(start).to(torch.int32))
    h = h.bitwise_xor_(_shift(h, 16)).mul_(0x7FEB352D)
    h = h.bitwise_xor_(_shift(h, 15)).mul_(_signed(0x846CA68B))
    h = h.bitwise_xor_(_shift(h, 16))
    return _shift(h, 8).to(torch.float32).mul_(2.0**-24).reshape(shape)


def seed(step: Tensor, salt: int) -> Tensor:
    """A step and a salt in one 0-dim tensor: with it alone ``uniform`` gives what it gives with both.

    Lets noise be drawn where the salt is not at hand, and drawn again instead of kept.
    """
    return step + offset(salt)


def offset(salt: int) -> int:
    """What ``seed`` adds to the step."""
    return _signed((salt & _MASK) * _UNMIXED & _MASK)


_Word = TypeVar("_Word", int, Tensor)


def _signed(word: _Word) -> _Word:
    """The 32-bit two's complement number with these bits."""
    return (word ^ 0x80000000) - 0x80000000


def _shift(h: Tensor, by: int) -> Tensor:
    """Logical shift to the right."""
    return (h >> by).bitwise_and_((1 << (32 - by)) - 1)
