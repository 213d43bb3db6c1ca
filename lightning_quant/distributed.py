"""The few collective operations this package needs; all are no-ops outside a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 outside a process group."""
    return dist.get_rank() if active() else 0


def reduce_ranges(ranges: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Widest range over ranks for each entry, in one collective.

    Args:
        ranges: (low, high) pairs; the same number and shapes on every rank.
    """
    if not active() or not ranges:
        return ranges
    flat = torch.cat([torch.cat([-low.reshape(-1), high.reshape(-1)]) for low, high in ranges])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    out, at = [], 0
    for low, high in ranges:
        n = low.numel()
        out.append((-flat[at : at + n].reshape(low.shape), flat[at + n : at + 2 * n].reshape(high.shape)))
        at += 2 * n
    return out


def mean(x: Tensor) -> Tensor:
    """Mean over ranks, in place of the same tensor on each."""
    if active():
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
        x /= dist.get_world_size()
    return x


def to_local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; other tensors as they are."""
    local = getattr(x, "to_local", None)
    return x if local is None else local()


def whole(x: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective: every rank must call it); others as they are."""
    full = getattr(x, "full_tensor", None)
    return x if full is None else full()


def barrier() -> None:
    """Wait for every rank."""
    if active():
        dist.barrier()
