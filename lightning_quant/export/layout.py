"""Names and parts that a model's tensors have on disk, where transformers computes with others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_quant.experts import ExpertWeight
from lightning_quant.layers import QuantLayer


def on_disk(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of the model as ``save_pretrained`` writes it: fused experts one by one, older names restored.

    Where several tensors become one on disk, and for models that are not transformers', it stays what it is.

    Args:
        model: The model.
        name: The tensor's name in it.
        tensor: Its value, or a tensor that has its first dimensions, such as scales.
    """
    if not hasattr(model, "save_pretrained"):
        return {name: tensor}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    rules: Any = getattr(model, "_weight_conversions", None)  # none at all for a model that none was used to load
    rules = get_model_conversion_mapping(model, add_legacy=False) if rules is None else rules  # type: ignore[arg-type]
    if not rules:
        return {name: tensor}
    if any(isinstance(rule, WeightConverter) and len(rule.target_patterns) > 1 for rule in rules):
        return {name: tensor}
    parts: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})  # type: ignore[arg-type]
    return parts


class Matrix(NamedTuple):
    """What a format of matrices stores of a weight, or of one of its experts.

    Attributes:
        path: The layer's, on disk.
        codes: (out, in), int8 (on a codebook int16 places).
        scale: (out, groups), real.
        zero: Zero points, (out, groups), in codes; None where they are fixed.
        offset: Real level of the lowest code, (out, groups); None for ranges without one.
    """

    path: str
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None


@torch.no_grad()
def stored_parts(model: nn.Module, name: str, layer: QuantLayer) -> Iterator[Matrix]:
    """The matrices of a weight: one, or one per expert.

    Args:
        model: The model.
        name: The weight's name in it.
        layer: The layer that owns the weight.
    """
    codes, *numbers = layer.weight_quant.stored(layer.folded()[0])
    rows = layer.weight_quant.rows[0]
    columns = [
        (n.expand(rows).unsqueeze(1) if n.ndim == 1 else n) if isinstance(n, Tensor) and n.ndim else None
        for n in numbers
    ]
    if not isinstance(layer, ExpertWeight):
        yield Matrix(name.removesuffix(".weight"), codes, *columns)  # type: ignore[arg-type]
        return
    axis = layer.output_axis
    shape = (len(codes), codes.shape[axis], -1)
    parts = [None if c is None else on_disk(model, name, c.reshape(shape).movedim(1, axis)) for c in columns]
    for key, part in on_disk(model, name, codes).items():
        own = [None if p is None else p[key] for p in parts]
        yield Matrix(key.removesuffix(".weight"), part, *own)  # type: ignore[arg-type]


def splits(model: nn.Module, name: str, layer: ExpertWeight) -> bool:
    """Whether each expert's (out, in) has a name of its own on disk, as readers of packed experts need.

    Args:
        model: The model.
        name: The weight's name in it.
        layer: The weight.
    """
    width = layer.weight.shape[-1]
    parts = on_disk(model, name, layer.weight.detach())
    return layer.output_axis == 1 and all(
        key.endswith(".weight") and part.ndim == 2 and part.shape[1] == width for key, part in parts.items()
    )
