"""Mean diagonal of the loss's Hessian with respect to each layer's weight, by Hutchinson's estimator.

``Tr(H) = E[v^T H v]``, v of random signs, ``H v = d(g . v)/dW``, g = dL/dW kept with its graph (double backward).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.progress import track

NOT_TWICE = ("derivative", "double backward", "differentiate twice", "does not require grad", "have been used")


@dataclass(frozen=True)
class Trace:
    """What was estimated for one layer.

    Attributes:
        mean: Trace over the number of weights.
        error: Standard error of that, over batches and probes.
    """

    mean: float
    error: float


def traces(
    layers: Mapping[str, QuantLayer],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
    probes: int = 4,
    seed: int = 0,
) -> dict[str, Trace]:
    """Estimate, for the weight each layer hands to its quantizer.

    Each layer is probed by itself.  One double backward for all of them takes less time per probe, but the blocks of
    the Hessian between layers add to its noise: on small trained Llamas of 14, 56 and 112 layers it was 5, 15 and 38
    times as fast, and its variance 120, 270 and 130 times as large in the median.  Memory: one batch's forward and the
    graph of its gradient, one gradient for each weight, and tensors of one layer's size.

    Args:
        layers: By path, their quantizers switched off, in evaluation mode.
        loss: Runs the model on a batch, scalar.
        batches: The loss is the mean over them.
        probes: Random vectors per batch and layer.
        seed: Of the vectors.

    Returns:
        By path; 0 for a layer that no batch reached.

    Raises:
        ValueError: A model that cannot be differentiated twice.

    Source: Dong et al., "HAWQ-V2", NeurIPS 2020, arXiv:1911.03852, section 2 (Hutchinson's algorithm).
    """
    recomputed = [layer for layer in layers.values() if layer.recomputes]
    for layer in recomputed:
        layer.recomputes = False  # the graph must hold the weight
    try:
        return _estimated(layers, loss, batches, probes, seed)
    finally:
        for layer in recomputed:
            layer.recomputes = True


def _estimated(
    layers: Mapping[str, QuantLayer], loss: Callable[[Any], Tensor], batches: Sequence[Any], probes: int, seed: int
) -> dict[str, Trace]:
    found: dict[str, list[float]] = {path: [] for path in layers}
    draws: dict[torch.device, torch.Generator] = {}
    for batch in track(batches, "Hessian's trace, batch by batch"):
        leaves: dict[str, Tensor] = {}
        handles = [layer.weight_quant.register_forward_hook(_cut(leaves, path)) for path, layer in layers.items()]
        try:
            with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
                value = loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        if not value.requires_grad:
            cure = "Let loss= run the model with gradients, on its own weights."
            raise ValueError(
                explain("measure 'hessian'", "a loss that depends on the weights", "one that does not", cure)
            )
        try:
            first = torch.autograd.grad(value, list(leaves.values()), create_graph=True, allow_unused=True)
            gradients = dict(zip(leaves, first, strict=True))
            _check(first)
            if all(g is None for g in first):
                raise RuntimeError("no weight is in the loss's graph, so there is no double backward")
            del first
            for path in track(list(found), "layer by layer"):
                g = gradients.pop(path, None)
                if g is None or not g.requires_grad:  # not reached, or the loss is linear in it
                    found[path] += [0.0] * probes
                    continue
                weight = leaves.pop(path)
                draw = draws.setdefault(weight.device, torch.Generator(weight.device).manual_seed(seed))
                found[path] += [_probe(g, weight, draw) for _ in range(probes)]
        except RuntimeError as error:
            if not any(word in str(error) for word in NOT_TWICE):
                raise
            cure = "Use another measure, or leave torch.compile and reentrant activation checkpointing out."
            raise ValueError(
                explain("measure 'hessian'", "a model that can be differentiated twice", str(error), cure)
            ) from error
    return {path: _summary(found[path], layers[path].weight.numel()) for path in layers}


def _check(gradients: Iterable[Tensor | None]) -> None:
    """Refuse graphs with what is differentiable once: autograd goes around it, and second derivatives would lack it."""
    nodes = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a custom function marked once_differentiable has no double backward")
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        nodes += following


def _cut(leaves: dict[str, Tensor], path: str) -> Callable[..., Tensor]:
    """A hook that hands on a weight as the start of a graph; a layer that is called twice has one weight."""

    def hook(quantizer: Any, args: Any, y: Tensor) -> Tensor:
        return leaves.setdefault(path, y.detach().requires_grad_())

    return hook


def _probe(g: Tensor, weight: Tensor, draw: torch.Generator) -> float:
    v = torch.randint(0, 2, weight.shape, generator=draw, device=weight.device, dtype=torch.int8).to(g.dtype)
    v = v.mul_(2).sub_(1)
    (product,) = torch.autograd.grad(g, weight, v, retain_graph=True, allow_unused=True)
    return 0.0 if product is None else float((v * product).sum(dtype=torch.float64))


def _summary(values: Iterable[float], numbers: int) -> Trace:
    sample = [x / max(numbers, 1) for x in values]
    mean = math.fsum(sample) / len(sample)
    spread = math.fsum((x - mean) ** 2 for x in sample) / max(len(sample) - 1, 1)
    return Trace(mean, math.sqrt(spread / len(sample)))
