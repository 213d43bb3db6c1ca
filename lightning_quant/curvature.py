"""Curvature of the loss at quantizers' outputs: Hutchinson's estimate of the mean diagonal of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_quant import distributed
from lightning_quant.attach import quantizers
from lightning_quant.errors import explain
from lightning_quant.noise import uniform
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer

Curvature = Mapping[FakeQuantizer, tuple[float, float]]


def curvature(
    model: nn.Module, loss: Callable[[], Tensor], step: int, probes: int = 50, tolerance: float = 1e-3
) -> Curvature:
    """Mean diagonal of the Hessian and spread of the gradient at every quantizer's output.

    Outputs count in units of the whole range, high level - low level = 1.  Each quantizer is probed by itself,
    ``v^T H v`` with v of random signs: probing all at once would cost one pass for all, and the blocks between
    quantizers would drown the traces.  The cost is one pass of double backward per probe and quantizer.

    Args:
        model: A model with quantizers.
        loss: Runs the model's forward and returns its scalar loss; called once.
        step: Seeds the signs.
        probes: At most this many Rademacher vectors per quantizer.
        tolerance: Stop when one more probe changes the mean by less than this share of it.

    Returns:
        For each quantizer that the loss depends on: (trace / N, standard deviation of the gradient), means over
        the ranks of a process group.

    Raises:
        ValueError: The model has no second derivative here.
    """
    with _unobserved(model), _shifted(model) as shifts, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        value = loss()
        found = {q: shift for q, shift in shifts.items() if shift.numel()}
        try:
            first = torch.autograd.grad(value, list(found.values()), create_graph=True, allow_unused=True)
            reached = {q: (s, g) for (q, s), g in zip(found.items(), first, strict=True) if g is not None}
            traces = {
                q: _trace(s, g, q.salt, step * probes, probes, tolerance)
                for q, (s, g) in track(list(reached.items()), "measuring curvature")
            }
        except RuntimeError as error:
            if not any(
                word in str(error)
                for word in ("derivative", "double backward", "differentiate twice", "does not require grad")
            ):
                raise
            cure = "Use a fixed delta, or leave torch.compile and reentrant activation checkpointing out."
            raise ValueError(
                explain("ewgs.delta='hessian'", "a model that can be differentiated twice", str(error), cure)
            ) from error
        flat = [n for q in reached for n in (traces[q] / reached[q][0].numel(), _std(reached[q][1]))]
    values = distributed.mean(torch.tensor(flat, dtype=torch.float64)).tolist()
    return {q: (values[2 * i], values[2 * i + 1]) for i, q in enumerate(reached)}


def _std(g: Tensor) -> float:
    return float(g.detach().double().std(correction=0))


def _trace(shift: Tensor, g: Tensor, salt: int, first: int, probes: int, tolerance: float) -> float:
    """Running mean of v^T H v, with H the block of one quantizer."""
    total = mean = 0.0
    for probe in range(probes if g.requires_grad else 0):
        v = _signs(shift, first + probe, salt)
        (product,) = torch.autograd.grad(g, shift, v, retain_graph=True, allow_unused=True)
        if product is None:
            return 0.0
        total += float((v.double() * product.double()).sum())
        before, mean = mean, total / (probe + 1)
        if probe and abs(mean - before) <= tolerance * (abs(before) + 1e-12):
            break
    return mean


def _signs(like: Tensor, count: int, salt: int) -> Tensor:
    """Random signs of a tensor's shape."""
    at = torch.tensor(count, device=like.device)
    return torch.where(uniform(like.shape, at, salt) < 0.5, -1.0, 1.0).to(like.dtype)


@contextmanager
def _shifted(model: nn.Module) -> Iterator[dict[FakeQuantizer, Tensor]]:
    """While open, every quantizer adds a zero to its output, in units of its range, that can be differentiated by."""
    shifts: dict[FakeQuantizer, Tensor] = {}

    def hook(q: FakeQuantizer, args: tuple[Tensor], y: Tensor) -> Tensor:
        with torch.no_grad():
            view, scale, _, _ = q.blocks(q.estimator.transform(q, args[0].detach()))
            low, high = q.grid.span()
            width = q.granularity.unview((scale * (high - low)).expand(view.shape), y.shape).to(y.dtype)
        shift = shifts.setdefault(q, torch.zeros_like(y, requires_grad=True))
        return y + shift * width if shift.shape == y.shape else y

    handles = [q.register_forward_hook(hook) for _, q in quantizers(model)]
    try:
        yield shifts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unobserved(model: nn.Module) -> Iterator[None]:
    """While open, ranges are not observed; afterwards random state and the model's buffers are as before."""
    observing = [q for _, q in quantizers(model) if q.observing]
    buffers = [(b, b.clone()) for b in model.buffers()]
    device = next(model.parameters()).device
    try:
        for q in observing:
            q.observing = False
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for q in observing:
            q.observing = True
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
