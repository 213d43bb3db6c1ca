"""OCS: the inputs of a layer with the largest weights are read twice, with half of the weight each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import AttachError, explain
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.grids import LayerGrid, layer_grids
from lightning_quant.transforms.pairs import as_batches, whole
from lightning_quant.transforms.rescale import Applied, TransformReport, difference


class Copies(nn.Module):
    """Reads some channels more than once.

    Args:
        index: Channel that each output channel is a copy of.
        axis: Dimension of the channels.
    """

    index: Tensor

    def __init__(self, index: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Channels of ``x``, some of them copied to the end."""
        return x.index_select(self.axis, self.index)


def split(w: Tensor, step: Tensor | float) -> tuple[Tensor, Tensor]:
    """Halves ``(w - step/2) / 2`` and ``(w + step/2) / 2``, which round to what w itself would round to.

    Args:
        w: Real.
        step: Of the grid, real.

    >>> a, b = split(torch.tensor([3.0, -2.6]), 1.0)
    >>> (torch.floor(a + 0.5) + torch.floor(b + 0.5)).tolist()
    [3.0, -3.0]
    """
    return (w - step / 2) / 2, (w + step / 2) / 2


@torch.no_grad()
def ocs(model: nn.Module, batches: Iterable[Any], config: QuantConfig, expand: float = 0.02) -> TransformReport:
    """Split the input channels with the largest weights of every layer, in place.

    ``ceil(expand * channels)`` times the channel with the largest weight is copied; of its weights those above half
    of the largest are split, the others stay with the first copy.  A layer becomes ``Sequential(Copies, layer)``, with
    another path and another shape: for models that are exported as a graph, and not in the ``setup`` of a run.

    Args:
        model: In float, before ``attach``, in modules of its own.
        batches: Data, of which the first proves that the output stays.
        config: Whose weight specs say what a step is.
        expand: Share of channels to add.

    Raises:
        AttachError: A model of transformers, whose config says what shapes its layers have.
        ValueError: A share outside of (0, 1].

    Source: Zhao et al., "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting",
    ICML 2019, arXiv:1901.09504.
    """
    if not 0 < expand <= 1:
        raise ValueError(explain("ocs.expand", "a share in (0, 1]", expand, "Use for example 0.02."))
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        cure = "Use smoothquant or awq, which keep shapes."
        raise AttachError(explain("ocs", "a model whose layers may change shape", type(model).__name__, cure))
    batch, report = as_batches(batches)[0], TransformReport()
    start = whole(model, batch)[1]()
    grids = layer_grids(model, config)
    for path, grid in grids.items():
        layer: Any = model.get_submodule(path)
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) or int(getattr(layer, "groups", 1)) > 1:
            report.refused[path] = f"{type(layer).__name__} does not read each channel with weights of its own"
            continue
        head, _, name = path.rpartition(".")
        parent = model.get_submodule(head)
        weight, index = split_weight(layer.weight, grid, math.ceil(expand * layer.weight.shape[1]))
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
        size = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
        setattr(layer, size, len(index))
        axis = -1 if isinstance(layer, nn.Linear) else 1
        setattr(parent, name, nn.Sequential(Copies(index.to(weight.device), axis), layer))
        report.applied.append(Applied(path, (), "ocs", 0.0))
    moved = difference(start, whole(model, batch)[1]())
    report.applied = [Applied(a.producer, (), "ocs", moved) for a in report.applied]
    return report


def split_weight(weight: Tensor, grid: LayerGrid, count: int) -> tuple[Tensor, Tensor]:
    """A weight with ``count`` input channels more, and the channel each of its inputs reads."""
    w, index = weight.detach().clone(), list(range(weight.shape[1]))
    for _ in range(count):
        largest = w.abs().transpose(0, 1).flatten(1).amax(dim=1)
        channel = int(largest.argmax())
        own = w[:, channel]
        large = own.abs() > largest[channel] / 2
        step = largest[channel] / (2**grid.plan.weight.bits - 1)  # of the grid whose ends the halves are
        first, second = split(own, step)
        copy = torch.where(large, second, torch.zeros_like(own))
        w[:, channel] = torch.where(large, first, own)
        w = torch.cat([w, copy.unsqueeze(1)], dim=1)
        index.append(index[channel])
    return w, torch.tensor(index)


__all__ = ["Copies", "ocs", "split", "split_weight"]
