"""Put quantizers into a model and take them out again, changing classes in place.

Parameters keep their identity and their names; a float checkpoint keeps its keys.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lightning_quant.adapters import lora_layers
from lightning_quant.errors import AttachError, CoverageError, explain
from lightning_quant.estimators import ESTIMATORS, Estimator, build_estimator
from lightning_quant.experts import ExpertWeight, QuantExperts
from lightning_quant.fast_path import close_fast_paths, open_fast_paths
from lightning_quant.granularity import Granularity
from lightning_quant.layers import QuantLayer, float_class
from lightning_quant.norms import FOLDED, FoldedBatchNorm
from lightning_quant.operators import attach_operators, detach_operators
from lightning_quant.plan import LayerPlan, make_plan
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.report import Report
from lightning_quant.resolve import resolve_activation
from lightning_quant.spec import QuantConfig, TensorSpec

EVERYWHERE = "a weight that is quantized wherever it is read"
ALIKE = "Quantize both alike (embeddings=True and head=True with w8) or neither, or untie them."


def attach(model: nn.Module, config: QuantConfig) -> Report:
    """Turn the model's supported layers into quantized ones, in place.

    Everything is checked before anything is changed.  Weight ranges are read off the weights as they are
    now, so load them first.

    Args:
        model: Any module; not yet wrapped, dispatched or compiled.
        config: What to quantize and how.

    Returns:
        What was attached, what was left out and why, with shares of the weights.

    Raises:
        AttachError: Nothing to quantize, an unused rule, a group size that does not divide, a patched
            forward, weights without values, or quantizers already in place.
        ValueError: Unknown method, option or observer.
    """
    estimator = build_estimator(config.method, dict(config.options))
    if is_attached(model):
        raise AttachError(
            explain(type(model).__name__, "a float model", "one with quantizers", "Call detach(model) first.")
        )
    plan = make_plan(model, config, estimator)
    weights, inputs = estimator.role(True), estimator.role(False)
    weights = weights.fit({p.path: p.rows for p in plan.layers}, {p.path: p.scales for p in plan.layers})
    quantizers = [_quantizers(p, config, weights, inputs) for p in plan.layers]
    for layer, (weight, activation) in track(list(zip(plan.layers, quantizers, strict=True)), "fitting weight ranges"):
        module: QuantLayer = layer.module  # type: ignore[assignment]
        module.__class__ = layer.kind
        if layer.path in plan.norms:
            norm = model.get_submodule(plan.norms[layer.path])
            norm.__class__ = FOLDED[type(norm)]
            norm.follows = config.batch_norm == "two_pass"  # type: ignore[assignment]
            module.folds = (norm,)  # type: ignore[assignment]
        with torch.no_grad():
            weight.fit_range(module.folded()[0])
        module.add_module("weight_quant", weight)
        module.add_module("input_quant", activation)
        module.train(module.training)
        if isinstance(module, ExpertWeight):
            module.join()
    _join_adapters(model)
    attach_operators(model, plan.operators, partial(_operand, config))
    close_fast_paths(model)
    return plan.report


def _quantizers(
    plan: LayerPlan, config: QuantConfig, weights: Estimator, inputs: Estimator
) -> tuple[FakeQuantizer, FakeQuantizer | None]:
    weight: Tensor = plan.module.weight  # type: ignore[assignment]
    build = partial(FakeQuantizer, target=config.target, dtype=weight.dtype, device=weight.device)
    salt = zlib.crc32(plan.path.encode()) ^ config.seed
    where = f"{plan.path}.weight"
    own = build(plan.weight, plan.granularity, weights, shape=tuple(weight.shape), salt=salt, where=where)
    if plan.activation is None:
        return own, None
    of_inputs = build(
        plan.activation,
        Granularity(plan.activation.granularity, None, plan.activation.group_size or 0),
        inputs,
        channels=getattr(plan.module, plan.kind.input_channels),
        channel_axis=plan.kind.channel_axis,
        salt=~salt,
        where=f"{plan.path}.input",
    )
    if of_inputs.observer.data_free and not of_inputs.spec.dynamic:
        of_inputs.fit_range(torch.empty(1, 0))
    return own, of_inputs


def _join_adapters(model: nn.Module) -> None:
    """Let base layers of LoRA that are quantized now round the merged weight."""
    for _, lora in lora_layers(model):
        base = lora.base_layer
        if isinstance(base, QuantLayer):
            from lightning_quant.lora import LoraFold, QuantLoraLinear

            lora.__class__ = QuantLoraLinear
            base.folds = (LoraFold(lora),)  # type: ignore[arg-type]


def _operand(config: QuantConfig, where: str) -> FakeQuantizer:
    """The quantizer of what an operator reads: straight-through, its range observed in the calibration steps."""
    rule = ESTIMATORS["ste"]()
    spec = TensorSpec(config.operators or 8, granularity="tensor", dynamic=False)
    return FakeQuantizer(resolve_activation(spec, True, rule, where), Granularity("tensor", None), rule, where=where)


def detach(model: nn.Module, fold: bool = True) -> nn.Module:
    """Restore the float classes and drop the quantizers; the keys are those the model was born with.

    Args:
        model: A model with quantizers.
        fold: Leave the weights on their grid (what evaluation computed) instead of the latent ones.
            Activations are float afterwards either way.

    Returns:
        The same model.

    Raises:
        AttachError: ``fold`` with LoRA adapters that are not merged, or a weight that is float elsewhere.
    """
    for path, lora in lora_layers(model) if fold else ():
        if isinstance(lora.base_layer, QuantLayer):
            cure = "Call merge_and_unload(), then detach what it returns; or detach(model, fold=False)."
            raise AttachError(explain(path, "adapters merged first", "adapters beside a quantized layer", cure))
    for path, other in read_in_float(model).items() if fold else ():
        raise AttachError(explain(path, EVERYWHERE, f"one that {other} reads in float", ALIKE))
    for _, layer in list(quant_layers(model)):
        if fold:
            with torch.no_grad():
                for tensor, value in [(layer.weight, layer.on_grid()), *deployed_norm(layer)]:
                    tensor.copy_(value)
        for folded in layer.folds:
            folded.undo()
        if isinstance(layer, ExpertWeight):
            layer.leave()
            continue
        layer.__dict__.pop("folds", None)
        layer.__class__ = float_class(layer)  # type: ignore[assignment]
        del layer.weight_quant
        if "input_quant" in layer._modules:
            del layer.input_quant
    detach_operators(model)
    open_fast_paths(model)
    return model


def read_in_float(model: nn.Module) -> dict[str, str]:
    """Quantized layers whose weight another module reads in float, and that module: no one tensor is right for both."""
    readers: dict[int, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (QuantLayer, QuantExperts)):
            readers.update({id(p): path for p in module._parameters.values() if p is not None})
    return {path: readers[id(layer.weight)] for path, layer in quant_layers(model) if id(layer.weight) in readers}


@torch.no_grad()
def deployed_norm(layer: QuantLayer) -> list[tuple[Tensor, Tensor]]:
    """Tensors of a folded normalization and of the layer's bias, with the values that ship beside the on-grid weight.

    The normalization is left to add the folded bias and nothing else.
    """
    values = []
    for norm in layer.folds:
        if not isinstance(norm, FoldedBatchNorm):
            continue
        own: dict[str, Tensor] = {**norm._parameters, **norm._buffers}  # type: ignore[dict-item]
        values += [(own[name], value) for name, value in norm.identity(norm.fold(layer)[1]).items()]
        if layer.bias is not None:
            values.append((layer.bias, torch.zeros_like(layer.bias)))
    return values


def is_attached(model: nn.Module) -> bool:
    """Whether the model holds quantizers."""
    return any(True for _ in quant_layers(model))


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """The quantized layers with their paths, each once."""
    for path, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield path, module


def quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer]]:
    """All quantizers with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            yield path, module


def check_coverage(model: nn.Module, mode: str, phase: str) -> None:
    """Complain about quantizers that the last batch did not reach, then forget who was called.

    Args:
        model: A model with quantizers.
        mode: ``error``, ``warn`` or ``off``.
        phase: What the batch was for, for the message.

    Raises:
        CoverageError: Some were never called and ``mode`` is ``error``.
    """
    missed = []
    for path, q in quantizers(model):
        if not q.called:
            missed.append(path)
        q.called = False
    if not missed or mode == "off":
        return
    message = explain(
        missed[0],
        f"every quantizer to be called by a {phase} batch",
        f"{len(missed)} never called ({', '.join(missed[:4])}{', ...' if len(missed) > 4 else ''})",
        "Usual causes: nn.MultiheadAttention reads weights itself, "
        "accelerate hooks kept an old forward, experts that got no token, or an unused layer. "
        'Exclude them with LayerRule(match=..., weight=None), or set coverage="warn".',
    )
    if mode == "error":
        raise CoverageError(message)
    warnings.warn(message, stacklevel=2)


def without_quantizers(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (keys of the float model, quantizers' keys)."""
    prefixes = tuple(f"{path}." for path, _ in quantizers(model))
    mine = {k: v for k, v in state.items() if k.startswith(prefixes)} if prefixes else {}
    return {k: v for k, v in state.items() if k not in mine}, mine
