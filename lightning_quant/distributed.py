"""The few collective operations this package needs; all are no-ops outside a process group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, 0 outside a process group."""
    return dist.get_rank() if active() else 0


def reduce(rows: Tensor, largest: bool) -> Tensor:
    """Largest values or sums over ranks, of tensors of one shape on all; in place."""
    if active() and rows.numel():
        there = _within_reach(rows)
        dist.all_reduce(there, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        if there is not rows:
            rows.copy_(there)
    return rows


def broadcast(x: Tensor) -> None:
    """Give every rank the first one's values, in place."""
    if active() and x.numel():
        there = _within_reach(x)
        dist.broadcast(there, src=0)
        if there is not x:
            x.copy_(there)


def _within_reach(x: Tensor) -> Tensor:
    """A tensor where the process group can take it: NCCL knows GPUs only, and a model may not have moved there yet."""
    return x.cuda() if x.device.type == "cpu" and dist.get_backend() == "nccl" else x


def mean(x: Tensor) -> Tensor:
    """Mean over ranks of a tensor of one shape on all."""
    return reduce(x, largest=False) / (dist.get_world_size() if active() else 1)


def to_local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; other tensors as they are."""
    local = getattr(x, "to_local", None)
    return x if local is None else local()


def whole(x: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective: every rank must call it); others as they are."""
    full = getattr(x, "full_tensor", None)
    return x if full is None else full()


def like(value: Tensor, target: Tensor) -> Tensor:
    """The same whole value on every rank, sharded as ``target`` is; as it is where that is not."""
    mesh = getattr(target, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    copies = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(placements=target.placements)  # type: ignore[attr-defined]


def fill(target: Tensor, value: Tensor) -> None:
    """Copy the same whole value on every rank into a tensor that may be sharded."""
    to_local(target).copy_(to_local(like(value.to(target.dtype), target)))


def barrier() -> None:
    """Wait for every rank."""
    if active():
        dist.barrier()
