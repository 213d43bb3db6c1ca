"""Statistics of layers' inputs over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.bypass import evaluating
from lightning_quant.progress import track
from lightning_quant.transforms.pairs import call, channel_axis

Seen = Callable[[str, nn.Module, Tensor], object]


@torch.no_grad()
def watch_inputs(model: nn.Module, batches: Iterable[Any], paths: Iterable[str], seen: Seen) -> None:
    """Run a model in evaluation mode and show what these layers read.

    Args:
        model: In float.
        batches: Data.
        paths: Of the layers.
        seen: Gets the path of a layer, the layer and its input, at every call.
    """

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen(path, module, args[0].detach())

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(note(p)) for p in paths]
    try:
        with evaluating(model):
            for batch in track(batches, "reading activations"):
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input or output as (places, channels)."""
    return x.movedim(channel_axis(layer), -1).flatten(0, -2)


def input_absmax(model: nn.Module, batches: Iterable[Any], paths: Iterable[str]) -> dict[str, Tensor]:
    """Largest magnitude of each input channel of these layers; under a process group over all ranks.

    Arguments as of ``watch_inputs``.
    """
    found: dict[str, Tensor] = {}

    def note(path: str, layer: nn.Module, x: Tensor) -> None:
        now = channels_last(layer, x).abs().amax(dim=0)
        found[path] = torch.maximum(found[path], now) if path in found else now

    names = sorted(paths)
    watch_inputs(model, batches, names, note)
    if distributed.active():
        for path in names:
            found[path] = distributed.reduce(found[path].double(), True).to(found[path])
    return found


def input_absmean(model: nn.Module, batches: Iterable[Any], paths: Iterable[str]) -> dict[str, Tensor]:
    """Mean magnitude of each input channel of these layers; under a process group over all ranks."""
    return means(model, batches, paths, lambda path, layer, x: channels_last(layer, x).abs())


def means(
    model: nn.Module, batches: Iterable[Any], paths: Iterable[str], rows: Callable[[str, nn.Module, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Means over data, and over all ranks, of what ``rows`` makes of each layer's input: (places, channels)."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def note(path: str, layer: nn.Module, x: Tensor) -> None:
        values = rows(path, layer, x)
        total = values.double().sum(dim=0)
        sums[path] = sums[path] + total if path in sums else total
        counts[path] = counts.get(path, 0) + len(values)

    names = sorted(paths)
    watch_inputs(model, batches, names, note)
    found = {}
    for path in (name for name in names if name in sums):
        packed = torch.cat([sums[path], sums[path].new_tensor([counts[path]])])
        packed = distributed.reduce(packed, largest=False)
        found[path] = packed[:-1] / packed[-1]
    return found
