"""What PEFT puts around and beside a model's layers, told by class names so that PEFT need not be installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_quant.errors import explain

LORA = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.lora.bnb", "Linear8bitLt"),
    ("lightning_quant.lora", "QuantLoraLinear"),
}
PREFIX = "base_model.model."


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Layers of PEFT's LoRA for a Linear, a Conv1D or one of bitsandbytes, exact class, with their paths."""
    for path, module in model.named_modules():
        if (type(module).__module__, type(module).__name__) in LORA:
            yield path, module


def other_bases(model: nn.Module) -> set[int]:
    """Identities of layers that an adapter of another kind wraps: what it adds lies outside of their weight."""
    served = {id(module) for _, module in lora_layers(model)}
    return {id(m.base_layer) for m in model.modules() if _is_adapter(m) and id(m) not in served}


def beside(model: nn.Module) -> set[int]:
    """Identities of modules that are no layers of the model itself: adapters, and originals that copies replace."""
    found: set[int] = set()
    for module in model.modules():
        parts: list[nn.Module] = []
        if _is_adapter(module):
            parts = [child for name, child in module.named_children() if name != "base_layer"]
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            parts = [module.original_module]  # type: ignore[list-item]
        for part in parts:
            found.update(id(m) for m in part.modules())
    return found


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def float_path(path: str) -> str:
    """The path a module or tensor has in the model that PEFT was given.

    >>> float_path("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> float_path("base_model.model.score.modules_to_save.default.weight")
    'score.weight'
    """
    words = path.removeprefix(PREFIX).split(".")
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "modules_to_save":
            skip = True
        elif word != "base_layer":
            kept.append(word)
    return ".".join(kept)


def without_peft(model: nn.Module) -> nn.Module:
    """The model that ``get_peft_model`` was given, its adapters still in place; other models as they are.

    Raises:
        ValueError: Prompts that are learned beside the model, which no weight can hold.
    """
    if not (hasattr(model, "get_base_model") and hasattr(model, "peft_config")):
        return model
    if model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        expected, got = "adapters that merge into weights", type(model).__name__ + " with learned prompts"
        raise ValueError(explain("export", expected, got, "Train LoRA, or the whole model."))
    base: nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def float_paths(model: nn.Module) -> dict[str, str | None]:
    """The path of every module in the model that merging leaves behind; None for what it takes away."""
    found: dict[str, str | None] = {}

    def visit(module: nn.Module, path: str, name: str) -> None:
        inner = _inside(module)
        if inner is module:
            found[path] = name
            for word, child in module._modules.items():
                if child is not None:
                    visit(child, f"{path}.{word}".lstrip("."), f"{name}.{word}".lstrip("."))
            return
        below = dict(module.named_modules(prefix=path, remove_duplicate=False))
        found.update(dict.fromkeys(below))
        visit(inner, next(p for p, m in below.items() if m is inner), name)

    visit(model, "", "")
    return found


def without_adapters(model: nn.Module) -> nn.Module:
    """The model with everything that PEFT wrapped put back in its place, in place; adapters are not merged."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            while child is not None and _inside(child) is not child:
                child = module._modules[name] = _inside(child)
    return model


def acting_beside(model: nn.Module, quantized: set[int]) -> Iterator[tuple[str, Any]]:
    """Adapters that add something to layers without quantizers, with their paths; arguments as ``merged_beside``."""
    for path, module in model.named_modules():
        if _is_adapter(module) and id(module.base_layer) not in quantized:
            adapter: Any = module
            if adapter.active_adapters and not adapter.merged and not adapter.disable_adapters:
                yield path, adapter


def check_merges(model: nn.Module, quantized: set[int]) -> dict[str, Any]:
    """The adapters that ``merged_beside`` merges, with their paths.

    Raises:
        ValueError: See there.
    """
    acting = dict(acting_beside(model, quantized))
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(path)
    for path, module in acting.items():
        if not hasattr(module, "merge"):
            cure = "Call merge_and_unload() if it can; else use LoRA."
            raise ValueError(explain(path, "an adapter that merges", type(module).__name__, cure))
        shared = max((owners[id(tensor)] for tensor in module.base_layer.parameters()), key=len)
        if len(shared) > 1:
            got, cure = f"one shared by {', '.join(shared)}", "Leave it out of target_modules, or untie the weights."
            raise ValueError(explain(path, "a weight of its own to merge an adapter into", got, cure))
    return acting


@contextmanager
def merged_beside(model: nn.Module, quantized: set[int]) -> Iterator[None]:
    """While open, adapters of layers without quantizers are merged, by PEFT's own rule; then all is as it was.

    Args:
        model: The model.
        quantized: Identities of the layers that round the merged weight by themselves.

    Raises:
        ValueError: An adapter that does not merge, or a tied weight, whose other use would change with it.
    """
    acting = check_merges(model, quantized)
    kept = [
        (tensor, tensor.detach().clone()) for module in acting.values() for tensor in module.base_layer.parameters()
    ]
    try:
        for module in acting.values():
            module.merge()
        yield
    finally:
        for module in acting.values():
            module.merged_adapters.clear()
        for tensor, value in kept:
            tensor.data = value


def _inside(module: nn.Module) -> nn.Module:
    """What PEFT has wrapped: the layer under an adapter, the copy in use, the model; else the module itself."""
    if _is_adapter(module):
        inner: object = module.base_layer
    elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        copies: dict[str, nn.Module] = module.modules_to_save  # type: ignore[assignment]
        active = next((name for name in module.active_adapters if name in copies), None)  # type: ignore[union-attr]
        inner = module.original_module if active is None or module.disable_adapters else copies[active]
    elif hasattr(module, "token_adapter"):
        inner = module.token_adapter
    else:
        inner = without_peft(module)
    return inner  # type: ignore[return-value]
