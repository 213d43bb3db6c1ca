"""Put quantizers into a model and take them out again, changing classes in place.

Parameters keep their identity and their names; a float checkpoint keeps its keys.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import zero
from lightning_quant.adapters import lora_layers
from lightning_quant.errors import AttachError, CoverageError, explain
from lightning_quant.estimators import ESTIMATORS, Estimator, build_estimator
from lightning_quant.experts import ExpertWeight, QuantExperts
from lightning_quant.fast_path import close_fast_paths, open_fast_paths
from lightning_quant.granularity import Granularity
from lightning_quant.kv_cache import attach_kv_cache, detach_kv_cache
from lightning_quant.layers import QuantLayer, float_class, float_dtype, is_compact
from lightning_quant.norms import FOLDED, FoldedBatchNorm
from lightning_quant.observers.bn_stats import BnStats
from lightning_quant.operators import attach_operators, detach_operators
from lightning_quant.packed import CompactLinear
from lightning_quant.plan import LayerPlan, make_plan
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.report import Report
from lightning_quant.resolve import resolve_activation
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import KV_CACHES, QuantConfig

EVERYWHERE = "a weight that is quantized wherever it is read"
ALIKE = "Quantize both alike (embeddings=True and head=True with w8) or neither, or untie them."


def attach(model: nn.Module, config: QuantConfig, fit: bool = True) -> Report:
    """Turn the model's supported layers into quantized ones, in place.

    Everything is checked before anything is changed.  Weight ranges are read off the weights as they are
    now, so load them first.

    Args:
        model: Any module; not yet wrapped, dispatched or compiled.
        config: What to quantize and how.
        fit: Read weight ranges off the weights.  False where the quantizers' state is loaded next: weights may then
            be on the meta device, and quantizers are not, but for those with state as large as the weight.

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
    plan = make_plan(model, config, estimator, fit)
    weights, inputs = estimator.role(True), estimator.role(False)
    weights = weights.fit({p.path: p.rows for p in plan.layers}, {p.path: p.scales for p in plan.layers})
    pairs = [layer_quantizers(p, config, weights, inputs) for p in plan.layers]
    for layer, (weight, activation) in track(list(zip(plan.layers, pairs, strict=True)), "fitting weight ranges"):
        module: QuantLayer = layer.module  # type: ignore[assignment]
        module.__class__ = layer.kind
        if layer.path in plan.norms:
            norm = model.get_submodule(plan.norms[layer.path])
            norm.__class__ = FOLDED[type(norm)]
            norm.follows = config.batch_norm == "two_pass"  # type: ignore[assignment]
            module.folds = (norm,)  # type: ignore[assignment]
        module.add_module("weight_quant", weight)
        if fit:
            with torch.no_grad(), zero.gathered(module.sources()):
                weight.fit_range(module.folded()[0])
        module.add_module("input_quant", activation)
        module.train(module.training)
        if isinstance(module, ExpertWeight):
            module.join()
    _join_adapters(model)
    attach_operators(model, plan.operators, partial(_operand, config))
    attach_kv_cache(model, plan.attention, partial(_cached, model, config))
    close_fast_paths(model)
    once = not estimator.follows_curvature  # which goes backward twice
    for layer in plan.layers:
        layer.module.recomputes = config.recompute and once  # type: ignore[assignment]
    for _, quantizer in quantizers(model):
        quantizer.compiled = config.compile and once
    return plan.report


def layer_quantizers(
    plan: LayerPlan, config: QuantConfig, weights: Estimator, inputs: Estimator
) -> tuple[FakeQuantizer, FakeQuantizer | None]:
    """The quantizers of a layer's weight and of its inputs, if those are quantized; not in any model yet."""
    device = torch.device("cpu") if plan.device.type == "meta" else plan.device
    build = partial(FakeQuantizer, target=config.target, dtype=plan.dtype, device=device)
    salt = zlib.crc32(plan.path.encode()) ^ config.seed
    where = f"{plan.path}.weight"
    of_weight = partial(build, plan.weight, plan.granularity, weights, shape=plan.shape, salt=salt, where=where)
    own = of_weight(device=plan.device)
    if own.device != device and all(t.numel() < math.prod(plan.shape) for t in own.state_dict().values()):
        own = of_weight()
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
    if plan.ends is not None:
        of_inputs.observer = BnStats(*plan.ends)
    if of_inputs.observer.data_free and not of_inputs.spec.dynamic:
        of_inputs.fit_range(torch.empty(1, 0))
    return own, of_inputs


def _join_adapters(model: nn.Module) -> None:
    """Let base layers of LoRA that are quantized now round the merged weight."""
    for _, lora in lora_layers(model):
        base = lora.base_layer
        if isinstance(base, QuantLayer):
            from lightning_quant.lora import LoraFold

            base.folds = (LoraFold(lora),)  # type: ignore[arg-type]


def _operand(config: QuantConfig, where: str) -> FakeQuantizer:
    """The quantizer of what an operator reads: straight-through, its range observed in the calibration steps."""
    rule = ESTIMATORS["ste"]()
    spec = TensorSpec(config.operators or 8, granularity="tensor", dynamic=False)
    return FakeQuantizer(resolve_activation(spec, True, rule, where), Granularity("tensor", None), rule, where=where)


def _cached(model: nn.Module, config: QuantConfig, where: str) -> FakeQuantizer:
    """The quantizer of keys or values, as ``_operand``, around 0."""
    rule = ESTIMATORS["ste"]()
    spec = TensorSpec(**KV_CACHES[str(config.kv_cache)], symmetric=True, granularity="tensor", dynamic=False)  # type: ignore[arg-type]
    resolved, like = resolve_activation(spec, False, rule, where), next(model.parameters())
    kind = {"target": config.target, "dtype": float_dtype(model), "device": "cpu" if like.is_meta else like.device}
    return FakeQuantizer(resolved, Granularity("tensor", None), rule, where=where, **kind)  # type: ignore[arg-type]


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
                if isinstance(layer, CompactLinear):
                    layer.unpack(layer.on_grid())
                    continue
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
    detach_kv_cache(model)
    open_fast_paths(model)
    if fold:
        _forget_storage(model)
    return model


def _forget_storage(model: nn.Module) -> None:
    """Let ``save_pretrained`` write a plain checkpoint where nothing is bitsandbytes' any more."""
    for module in model.modules():
        loader: Any = module.__dict__.get("hf_quantizer")
        method = getattr(getattr(loader, "quantization_config", None), "quant_method", None)
        if method == "bitsandbytes" and not any(is_compact(m) for m in module.modules()):
            loader.remove_quantization_config(module)


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
