"""Names and parts that a model's tensors have on disk, where transformers computes with others."""

from __future__ import annotations

from collections.abc import Iterator

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

    rules = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
    if any(isinstance(rule, WeightConverter) and len(rule.target_patterns) > 1 for rule in rules):
        return {name: tensor}
    parts: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})  # type: ignore[arg-type]
    return parts


@torch.no_grad()
def stored_parts(model: nn.Module, name: str, layer: QuantLayer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a format of matrices stores of a weight: path, codes (out, in) and scales (out, groups) of each matrix.

    Args:
        model: The model.
        name: The weight's name in it.
        layer: The layer that owns the weight.
    """
    codes, scale, _, _ = layer.weight_quant.stored(layer.folded()[0])
    rows = layer.weight_quant.rows[0]
    scale = scale.expand(rows).unsqueeze(1) if scale.ndim == 1 else scale
    if not isinstance(layer, ExpertWeight):
        yield name.removesuffix(".weight"), codes, scale
        return
    axis = layer.output_axis
    scales = on_disk(model, name, scale.reshape(len(codes), codes.shape[axis], -1).movedim(1, axis))
    for key, part in on_disk(model, name, codes).items():
        yield key.removesuffix(".weight"), part, scales[key]


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
