"""What formats of plain matrices ask of a model: transformers', quantized Linear layers, each with its own weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_quant.attach import quant_layers
from lightning_quant.errors import explain
from lightning_quant.export.layout import on_disk
from lightning_quant.kv_cache import kv_quantizers
from lightning_quant.layers import QuantLayer, QuantLinear

FOLDED = "Use format='folded'."


def check_linear_only(model: nn.Module, format: str) -> None:
    """Refuse everything else by name.

    Args:
        model: A model with quantizers.
        format: For messages.

    Raises:
        ValueError: No model of transformers, quantized keys and values, another layer, a shared or renamed weight.
    """
    where = f"format={format!r}"
    if not hasattr(model, "save_pretrained"):
        raise ValueError(explain(where, "a transformers model", type(model).__name__, FOLDED))
    for path in kv_quantizers(model):
        raise ValueError(explain(f"{path} ({where})", "keys and values in float", "a quantizer", "Leave -kv8 out."))
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(module.weight), []).append(path)
    for path, layer in quant_layers(model):
        if not isinstance(layer, QuantLinear):
            raise ValueError(explain(f"{path} ({where})", "a Linear layer", type(layer).__name__, FOLDED))
        shared = owners.get(id(layer.weight), [path])
        if len(shared) > 1:
            got = f"one shared by {', '.join(shared)}"
            raise ValueError(explain(f"{path} ({where})", "a weight of its own", got, "Leave a tied head in float."))
        name = layer.weight_name(path)
        if [*on_disk(model, name, layer.weight.detach()[:0])] != [name]:
            raise ValueError(explain(f"{path} ({where})", "one name in the model and on disk", "two", FOLDED))


def float_linears(model: nn.Module) -> dict[str, Any]:
    """Linear layers without a quantizer, by path."""
    return {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, QuantLayer)}
