"""A part of a model that is quantized on its own, and what must hold for several of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import nn

from lightning_quant.adapters import lora_layers
from lightning_quant.attach import quant_layers
from lightning_quant.errors import AttachError, explain
from lightning_quant.estimators import Estimator
from lightning_quant.layers import QuantEmbedding, QuantLayer, layer_class
from lightning_quant.report import Report
from lightning_quant.spec import INHERIT, QuantConfig


def find_part(model: nn.Module, path: str | None, where: str = "QuantCallback.module") -> nn.Module:
    """The submodule at ``path``, which ``where`` gave; the model itself for None.

    Raises:
        AttachError: There is none.
    """
    if path is None:
        return model
    try:
        return model.get_submodule(path)
    except AttributeError:
        paths = [name for name, _ in model.named_modules() if name]
        near = difflib.get_close_matches(path, paths, n=3, cutoff=0.4)
        cure = f"Nearest: {', '.join(near)}." if near else f"Paths look like {paths[0]!r}." if paths else "It has none."
        raise AttachError(
            explain(where, f"the path of a submodule of {type(model).__name__}", repr(path), cure)
        ) from None


def has_layers(model: nn.Module, path: str | None) -> bool:
    """Whether the part exists and holds layers that are quantized or can be."""
    try:
        part = find_part(model, path)
    except AttachError:
        return False
    return any(_is_layer(module) for module in part.modules())


def refuse_shared(parts: Mapping[str | None, nn.Module]) -> None:
    """Complain about a layer that lies in two parts: their configs could not both hold.

    Raises:
        AttachError: There is one.
    """
    owner: dict[int, str | None] = {}
    for name, part in parts.items():
        for path, module in part.named_modules():
            if _is_layer(module) and owner.setdefault(id(module), name) != name:
                got = f"{path or 'the part itself'!r} of module={name!r} in module={owner[id(module)]!r} as well"
                cure = "Name parts that do not overlap, or use one callback with rules for what differs."
                raise AttachError(explain("QuantCallback.module", "every layer in one part", got, cure))


def refuse_changes(part: nn.Module, report: Report | None, layers: int) -> None:
    """Complain about layers that were made after quantizers were attached, or put in place of quantized ones.

    Args:
        part: The part.
        report: What was attached; None if it was not here.
        layers: Number of quantized layers there were.

    Raises:
        AttachError: There is one.
    """
    excluded = {entry.path for entry in report.excluded} if report is not None else None
    late = [p for p, m in part.named_modules() if excluded is not None and _is_float(m) and p not in excluded]
    if late:
        expected, got = "every layer to exist when quantizers are attached", f"{len(late)} made later"
        cure = "Make all layers in __init__, or all in a configure_model that does nothing when called again."
        raise AttachError(explain(late[0], expected, got, cure))
    found = sum(1 for _ in quant_layers(part))
    if found < layers:
        expected, got = f"all {layers} quantized layers to stay", f"{layers - found} replaced by others"
        cure = "Leave out what replaces layers when training starts, such as BitsandbytesPrecision."
        raise AttachError(explain(type(part).__name__, expected, got, cure))


def _is_float(module: nn.Module) -> bool:
    return layer_class(type(module)) is not None


def refuse_other_config(model: nn.Module, config: QuantConfig, estimator: Estimator) -> None:
    """Complain about quantizers in place that this config would not have made: of another method or width.

    Layers that rules, or their place in the model, give another width are compared by method alone.

    Raises:
        AttachError: There is one.
    """
    method = type(estimator.role(True))
    for path, layer in quant_layers(model):
        own, inputs = layer.weight_quant, layer.input_quant
        then, now = type(own.estimator).__name__.lower(), method.__name__.lower()
        same = type(own.estimator) is method
        if config.first_last == INHERIT and not any(rule.matches(path) for rule in config.rules):
            wanted = _width(config.weight), None if isinstance(layer, QuantEmbedding) else _width(config.activation)
            found = own.spec.bits, None if inputs is None else inputs.spec.bits
            same &= found == wanted
            then, now = f"{then} at {_words(*found)}", f"{now} at {_words(*wanted)}"
        if not same:
            cure = "Use the config it was attached with, or detach(model) first."
            raise AttachError(explain(path, f"quantizers of this config ({now})", f"{then}, in place already", cure))


def refuse_late_adapters(model: nn.Module) -> None:
    """Complain about adapters that were put around layers with quantizers: they would add to what is rounded.

    Raises:
        AttachError: There is one.
    """
    for path, lora in lora_layers(model):
        if isinstance(lora.base_layer, QuantLayer) and not lora.base_layer.folds:
            got, cure = "them the other way round", "Call get_peft_model on the float model, then attach."
            raise AttachError(explain(path, "adapters first and quantizers second", got, cure))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, QuantLayer) or _is_float(module)


def _width(spec: object) -> float | None:
    return getattr(spec, "bits", None)


def _words(weight: float | None, activation: float | None) -> str:
    return f"w{weight or 16:g}a{activation or 16:g}"
