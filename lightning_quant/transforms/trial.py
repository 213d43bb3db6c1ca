"""What factors between a producer and its readers would do to a quantized block, before any of them is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.transforms.grids import LayerGrid
from lightning_quant.transforms.pairs import Pair, channel_axis
from lightning_quant.transforms.rescale import multiply_inputs


@torch.no_grad()
def errors(
    model: nn.Module, pair: Pair, trials: list[Tensor], grids: Mapping[str, LayerGrid], inputs: bool
) -> list[float]:
    """Mean squared error of the block's output with its readers quantized, for each of several factors.

    Readers compute ``Q(X / s) Q(W s)^T``; nothing else in the block is rounded.

    Args:
        model: In float; left as it was.
        pair: A producer with its readers.
        trials: Factors per channel of the producer.
        grids: Of the layers; readers without one stay in float.
        inputs: Round what readers read as well.

    Returns:
        One number per trial, a mean over all ranks.
    """
    want = pair.part()
    found = []
    for factors in trials:
        with _quantized(model, pair, factors, grids, inputs):
            got = pair.part()
        gaps = [(x.double() - y.double()).square().mean() for x, y in zip(want, got, strict=True)]
        found.append(torch.stack(gaps).nansum())  # a mask's infinities are no error
    return [float(e) for e in distributed.mean(torch.stack(found))]


@contextmanager
def _quantized(
    model: nn.Module, pair: Pair, factors: Tensor, grids: Mapping[str, LayerGrid], inputs: bool
) -> Iterator[None]:
    """While open, readers compute with rounded weights, and inputs, under these factors."""
    kept, handles = [], []
    try:
        for path, index in pair.consumers.items():
            layer: Any = model.get_submodule(path)
            if path not in grids:
                continue
            kept.append((layer.weight, layer.weight.detach().clone()))
            s = factors[index]
            multiply_inputs(layer, s)
            layer.weight.copy_(grids[path].weight(layer.weight))
            multiply_inputs(layer, 1 / s)
            if inputs:
                handles.append(layer.register_forward_pre_hook(_Rounded(grids[path], s)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, value in kept:
            weight.copy_(value)


class _Rounded:
    """A hook that rounds a layer's input, divided by factors, and multiplies it again."""

    def __init__(self, grid: LayerGrid, factors: Tensor) -> None:
        self.grid, self.factors = grid, factors

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        wide = [1] * x.ndim
        wide[channel_axis(layer)] = -1
        s = self.factors.to(x).view(wide)
        return (self.grid.input(x / s) * s, *args[1:])
