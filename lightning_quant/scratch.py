"""Memory for what lives for one operation: asked for once, so that it stays in the processor's cache."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

LARGEST = 2**24  # elements; what is larger fits no cache anyway


class _Held(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Tensor] = {}


_held = _Held()


def scratch(like: Tensor) -> Tensor | None:
    """Uninitialized memory of a tensor's shape and dtype, which the next call in this thread hands out again.

    Returns:
        None on devices whose allocator keeps what is freed, and for very large tensors.
    """
    if like.device.type != "cpu" or like.numel() > LARGEST or type(like) not in (Tensor, torch.nn.Parameter):
        return None
    found = _held.by_dtype.get(like.dtype)
    if found is None or found.numel() < like.numel():
        found = _held.by_dtype[like.dtype] = torch.empty(like.numel(), dtype=like.dtype)
    return found[: like.numel()].view(like.shape)
