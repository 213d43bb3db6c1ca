"""Transforms of models in half precision work in float32, where a proof that the output stays means something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

HALVES = (torch.bfloat16, torch.float16)
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While open, parameters and buffers in half precision are in float32; then they are rounded to what they were.

    They stay the same objects.  Until it closes they take twice their memory.
    """
    halves = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.dtype in HALVES]
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


def computed_in_float32(transform: Callable[P, R]) -> Callable[P, R]:
    """A transform, whose first argument is the model, that runs under ``in_float32``."""

    @wraps(transform)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0] if args else kwargs["model"]
        with in_float32(model):
            return transform(*args, **kwargs)

    return run


def widened(model: nn.Module, given: Any) -> Any:
    """Arguments with tensors in half precision brought to float32, if that is what the model computes in."""
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if first in HALVES:
        return given
    return tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype in HALVES else t, given)


__all__ = ["computed_in_float32", "in_float32", "widened"]
