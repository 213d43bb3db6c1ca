"""Clip weights where finer steps are worth more than the largest values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.progress import track
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.grids import LayerGrid, layer_grids
from lightning_quant.transforms.observe import channels_last, watch_inputs
from lightning_quant.transforms.pairs import as_batches, whole
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import Applied, TransformReport, difference

STEPS = 10
ROWS, CHUNK = 256, 64


@computed_in_float32
@torch.no_grad()
def clip_weights(model: nn.Module, batches: Iterable[Any], config: QuantConfig) -> TransformReport:
    """Clip the weights of linear layers at ``max (1 - i/20)``, i in 0...9, per group and output channel, in place.

    Chosen is what brings the group's share of the output, ``sum_k X_k Q(W_k)``, nearest to the float one.

    **An approximation**: the float function changes; the report says by how much.

    Args:
        model: In float, before ``attach``.
        batches: Calibration data.
        config: Whose weight specs are followed.

    Source: AWQ's search (arXiv:2306.00978, its code).
    Deviation: layers that make queries and keys are left out there; here a layer is put back where the model's output,
    with that layer alone rounded, does not come nearer to the float model's.
    """
    data, grids = as_batches(batches), layer_grids(model, config)
    layers = {path: grid for path, grid in grids.items() if isinstance(model.get_submodule(path), nn.Linear)}
    read = _samples(model, data, layers)
    report = TransformReport()
    report.refused = {p: f"{type(model.get_submodule(p)).__name__} is no Linear" for p in grids if p not in layers}
    start = whole(model, data[0])[1]()
    for path, grid in track(sorted(layers.items()), "clipping weights"):
        layer: Any = model.get_submodule(path)
        if path not in read:
            report.refused[path] = "no batch reaches it"
            continue
        before = layer.weight.detach().clone()
        clipped = clipped_weight(before, read[path], grid)
        apart = [_apart(model, data[0], layer, grid.weight(w), start) for w in (before, clipped)]
        keep = apart[1] < apart[0]
        layer.weight.copy_(clipped if keep else before)
        if keep:
            report.applied.append(Applied(path, (), "clip", 0.0))
        else:
            report.refused[path] = "clipped, it would not bring the output nearer"
    total = difference(start, whole(model, data[0])[1]())
    report.applied = [Applied(a.producer, (), "clip", total) for a in report.applied]
    return report


def clipped_weight(weight: Tensor, x: Tensor, grid: LayerGrid) -> Tensor:
    """A weight (out, in), clipped per group and output channel; x is a sample of inputs (places, in)."""
    width = weight.shape[1]
    size = grid.plan.weight.group_size or width
    size = size if width % size == 0 else width
    view = weight.view(len(weight), -1, size)
    largest = view.abs().amax(dim=-1, keepdim=True)
    best, least = weight.clone().view_as(view), torch.full_like(largest, torch.inf)
    for i in range(STEPS):
        limit = largest * (1 - i / 20)
        trial = view.clamp(-limit, limit)
        rounded = grid.weight(trial.reshape(weight.shape)).view_as(view)
        error = distributed.mean(_group_errors(x, rounded - view)).unsqueeze(-1)
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best.reshape(weight.shape)


def _group_errors(x: Tensor, delta: Tensor) -> Tensor:
    """Mean squared share of each group in the output: x (places, in), delta (out, groups, size) -> (out, groups)."""
    rows = x.to(delta).view(len(x), -1, delta.shape[-1])
    return torch.cat([torch.einsum("ngk,ogk->nog", rows, d).square().mean(dim=0) for d in torch.split(delta, CHUNK)])


def _samples(model: nn.Module, data: list[Any], layers: Iterable[str]) -> dict[str, Tensor]:
    """A few rows of what each layer reads."""
    kept: dict[str, list[Tensor]] = {}

    def note(path: str, layer: nn.Module, x: Tensor) -> None:
        rows = channels_last(layer, x)
        every = max(1, len(rows) * len(data) // ROWS)
        kept.setdefault(path, []).append(rows[::every])

    watch_inputs(model, data, layers, note)
    return {path: torch.cat(found) for path, found in kept.items()}


def _apart(model: nn.Module, batch: Any, layer: Any, rounded: Tensor, start: list[Tensor]) -> float:
    """How far the model's output is from the start with this one layer rounded."""
    own = layer.weight.detach().clone()
    layer.weight.copy_(rounded)
    got = whole(model, batch)[1]()
    layer.weight.copy_(own)
    gaps = [(a.double() - b.double()).square().sum() for a, b in zip(start, got, strict=True) if a.is_floating_point()]
    return float(distributed.mean(torch.stack(gaps).sum().reshape(1)))


__all__ = ["clip_weights", "clipped_weight"]
