"""What a layer adds to every place of its output: its bias, or that of the normalization right after it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def add_to_output(model: nn.Module, path: str, norms: Mapping[str, str], shift: Tensor) -> str | None:
    """Add a number per channel to a layer's output, in place.

    Args:
        model: In float.
        path: Of the layer.
        norms: Path of a layer -> path of the batch normalization right after it.
        shift: (channels,), real.

    Returns:
        None if it was done, else why it cannot be: nothing is there to hold it.
    """
    layer = model.get_submodule(path)
    bias: Any = layer._parameters.get("bias")
    if bias is not None:
        bias.add_(shift.to(bias))
        return None
    norm: Any = model.get_submodule(norms[path]) if path in norms else None
    if norm is not None and norm.running_mean is not None:
        norm.running_mean.sub_(shift.to(norm.running_mean))
        return None
    return "it has no bias"


def applied_to(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What a layer would make of an input with another weight and no bias."""
    twin: Any = copy.copy(layer)
    bias: Any = layer._parameters.get("bias")
    twin._parameters = {"weight": weight, "bias": None if bias is None else torch.zeros_like(bias)}
    y: Tensor = type(layer).forward(twin, x)
    return y


def sums_over_inputs(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """What the layer adds, far from borders, where each of its input channels is constant: x (channels,)."""
    w = weight.double()
    if type(layer).__name__ == "Conv1D":
        return x.double() @ w
    groups = int(getattr(layer, "groups", 1))
    kernel = w.flatten(2).sum(dim=2) if w.ndim > 2 else w
    rows = x.double().view(groups, -1).repeat_interleave(len(w) // groups, dim=0)
    return (kernel * rows).sum(dim=1)
