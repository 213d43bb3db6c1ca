"""Closed-form gradients of distillation's terms, and how they join the loss's own.

With student outputs z, a teacher's y, softened by a temperature T, and a factor c per position (c = mask / count):

    L = w T^2 sum_i c_i KL(p_i || q_i),  p = softmax(y / T),  q = softmax(z / T)
    dL/dz_i = w T c_i (q_i - p_i)
    H = h / n sum_l sum_i c_i mean_d (z_lid - y_lid)^2   over n hidden states of d channels
    dH/dz_lid = 2 h c_i / (n d) (z_lid - y_lid)

Both need nothing from the backward pass, so they are computed in the forward one, a few rows at a time, and all that
is kept until then is one tensor of the outputs' shape and dtype: no softmax, and nothing of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22  # elements at a time: 16 MiB for each value in float32


@torch.no_grad()
def soft_target_gradient(
    z: Tensor, y: Tensor, share: Tensor, temperature: float, scale: float | Tensor = 1.0, measure: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient of ``T^2 sum_i share_i KL(softmax(y_i / T) || softmax(z_i / T))`` by z.

    Args:
        z: Student outputs, (N, K).
        y: Teacher outputs, (N, K).
        share: What each row counts, (N,).
        temperature: T.
        scale: Multiplies the gradient, not the value.
        measure: Whether the value is wanted.

    Returns:
        The gradient, of z's shape and dtype, and the value, 0-dim, or None.
    """
    gradient = torch.empty_like(z, memory_format=torch.contiguous_format)
    value = share.new_zeros(()) if measure else None
    for rows in _chunks(z):
        wide = torch.promote_types(z.dtype, torch.float32)
        own = torch.log_softmax(z[rows].to(wide) / temperature, -1)
        given = torch.log_softmax(y[rows].to(wide) / temperature, -1)
        p = given.exp()
        if value is not None:  # 0 log 0 = 0, for outputs masked with -inf
            divergence = torch.where(p > 0, p * (given - own), 0.0).sum(-1)
            value += temperature**2 * (share[rows] * divergence).sum()
        gradient[rows] = own.exp_().sub_(p).mul_((share[rows] * (temperature * scale)).unsqueeze(-1))
    return gradient, value


@torch.no_grad()
def square_gradient(
    z: Tensor, y: Tensor, share: Tensor, scale: float | Tensor = 1.0, measure: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gradient of ``sum_i share_i mean_d (z_id - y_id)^2`` by z, and the value: as ``soft_target_gradient``."""
    gradient = torch.empty_like(z, memory_format=torch.contiguous_format)
    value = share.new_zeros(()) if measure else None
    for rows in _chunks(z):
        wide = torch.promote_types(z.dtype, torch.float32)
        off = z[rows].to(wide) - y[rows].to(wide)
        if value is not None:
            value += (share[rows] * off.square().mean(-1)).sum()
        gradient[rows] = off.mul_((share[rows] * (2 / z.shape[-1] * scale)).unsqueeze(-1))
    return gradient, value


def _chunks(z: Tensor) -> Iterator[slice]:
    """Slices of rows."""
    size = max(1, CHUNK // max(z.shape[-1], 1))
    return (slice(start, start + size) for start in range(0, len(z), size))


class AddGradient(torch.autograd.Function):
    """Tensors as they are, to whose gradients something is added: ``AddGradient.apply(extras, note, *tensors)``.

    ``extras``: a tensor or None for each.  All are added once, whichever of the results a backward pass comes from,
    so that one of them reaches even what a loss was computed from before.  ``note`` is called in that pass.
    """

    @staticmethod
    def forward(
        ctx: Any, extras: list[Tensor | None], note: Callable[[], None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """The tensors; aliases, which unlike views may be changed in place."""
        ctx.set_materialize_grads(False)
        ctx.added = [extra is not None for extra in extras]
        ctx.note = note
        ctx.save_for_backward(*(extra for extra in extras if extra is not None))
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """``g + extra``."""
        ctx.note()
        extras = iter(ctx.saved_tensors)
        joined = []
        for g, added in zip(gradients, ctx.added, strict=True):
            extra = next(extras) if added else None
            joined.append(g if extra is None else extra if g is None else g + extra)
        return (None, None, *joined)
