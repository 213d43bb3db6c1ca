"""Parameters that DeepSpeed's ZeRO partitions, or steps in a copy of its own; other parameters are as they are.

ZeRO-3 keeps a part of every parameter on each rank and leaves an empty tensor in its place: ``gathered`` makes it
whole for a while.  All stages step in a flat copy in 32 bits, from which the parameters are written anew after each
step: what is written to a parameter must reach that copy as well, which is what ``written`` is for.  Every rank must
open these contexts with the same parameters, and write the same values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def shape(x: Tensor) -> tuple[int, ...]:
    """The whole shape of a tensor that may be partitioned."""
    return tuple(getattr(x, "ds_shape", x.shape))


def is_partitioned(x: Tensor) -> bool:
    """Whether each rank holds a part of it (ZeRO-3)."""
    return hasattr(x, "ds_id")


def is_stepped(x: Tensor) -> bool:
    """Whether ZeRO's optimizer holds a copy of it, of whatever stage."""
    return hasattr(x, "_hp_mapping") or hasattr(x, "_z3_optimizer")


def numel(x: Tensor) -> int:
    """How many numbers a tensor that may be partitioned holds in all."""
    return math.prod(shape(x))


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Whole on every rank while open, to be read; a collective under ZeRO-3, and nothing without it."""
    parts = _partitioned(parameters)
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


@contextmanager
def written(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Whole on every rank while open, to be written: parts and the optimizer's copy follow where values changed.

    Elements that were not written keep the digits that the copy has beyond a 16-bit parameter's.
    """
    held = list({id(p): p for p in parameters}.values())
    parts = _partitioned(held)
    stepped = [p for p in held if p.requires_grad and is_stepped(p)]
    if not parts and not stepped:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0) if parts else gathered(()):
        before = [p.detach().clone() for p in stepped]
        yield
        moved = [p.detach() != old for p, old in zip(stepped, before, strict=True)]
        any_moved = torch.stack([m.any() for m in moved]).tolist() if moved else []
        for parameter, where, wanted in zip(stepped, moved, any_moved, strict=True):
            if wanted:
                _copy_to_optimizer(parameter, where)


@contextmanager
def with_gradient(parameter: Tensor) -> Iterator[None]:
    """While open, ``parameter`` (whole already) has its gradient, reduced over ranks, in ``grad``: a collective."""
    if parameter.grad is not None or not is_stepped(parameter):
        yield
        return
    from deepspeed.utils import safe_get_full_grad

    whole = safe_get_full_grad(parameter)
    parameter.grad = None if whole is None else whole.to(parameter.dtype).reshape(parameter.shape)
    try:
        yield
    finally:
        parameter.grad = None


def _partitioned(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p for p in parameters if is_partitioned(p)]


def _copy_to_optimizer(parameter: Tensor, where: Tensor) -> None:
    """Take the values at ``where`` of a whole parameter over into the optimizer's copy of it."""
    from deepspeed import utils

    if not is_partitioned(parameter):
        own = utils.safe_get_full_fp32_param(parameter)
        utils.safe_set_full_fp32_param(parameter, torch.where(where, parameter.detach().to(own.dtype), own))
        return
    own = utils.safe_get_local_fp32_param(parameter)
    value, where = _part(parameter, parameter.detach()), _part(parameter, where)
    utils.safe_set_local_fp32_param(parameter, torch.where(where, value.to(own), own))


def _part(parameter: Tensor, values: Tensor) -> Tensor:
    """This rank's part of the whole ``values`` of a partitioned parameter, filled up with zeros as DeepSpeed does."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = values.flatten()[size * dist.get_rank(parameter.ds_process_group) :][:size]  # type: ignore[attr-defined]
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))
