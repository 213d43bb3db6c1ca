"""From a model with quantizers in memory to one that computes with their integers."""

from __future__ import annotations

import torch
from torch import nn

from lightning_quant.attach import quant_layers
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.layers import QuantLayer, QuantLinear
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.runtime.choose import Kind, build, choose
from lightning_quant.runtime.report import Line, Plan
from lightning_quant.runtime.stored import InputRule, StoredLinear
from lightning_quant.targets import TARGETS


@torch.no_grad()
def convert(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replace the quantized Linear layers of a trained model by low-bit ones, **in place**.

    Their float weights are gone afterwards: save or export first, or hand in a deepcopy.  Layers that no kernel
    computes stay the quantized layers they are, and ``runtime_report`` says why; other parameters are converted to
    ``dtype``, buffers (rotary tables, running statistics) are not.  The model is in evaluation mode.

    Args:
        model: With quantizers, on the device where it is to run.
        dtype: Of activations and dense parameters; the int4 and int8 kernels have bfloat16 only.

    Returns:
        The model; a module of its own only where the model itself was the layer.

    Raises:
        ValueError: No quantized layer.
    """
    layers = list(quant_layers(model))
    if not layers:
        cure = "Convert before detach(), from the trained model, or load an export."
        raise ValueError(explain("convert", "a model with quantizers", "a float model", cure))
    model.eval()
    lines, shared = [], _shared(model)
    for path, layer in layers:
        reason = "a weight that other layers share" if id(layer.weight) in shared else _refusal(layer)
        if reason:
            lines.append(Line(path, "none", f"{reason}; computed as in training"))
            continue
        stored = _stored(layer)
        shape = (stored.codes.shape[0], stored.codes.shape[1])
        kind = Kind(shape, stored.bits, stored.scale.shape[1], True, stored.inputs is not None)
        device = layer.weight.device
        line = Line(path, *choose(kind, dtype, device))
        low_bit = build(line.kernel, stored, dtype, device)
        lines.append(line)
        if path:
            model.set_submodule(path, low_bit)
        else:
            model = low_bit
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.runtime_report = Plan(tuple(lines))  # type: ignore[assignment]
    return model.eval()


def _shared(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _refusal(layer: QuantLayer) -> str:
    """Why a layer has no integers that ``StoredLinear`` can hold, or an empty string."""
    weight, inputs = layer.weight_quant, layer.input_quant
    if type(layer) is not QuantLinear:
        return f"{type(layer).__name__} is no Linear layer of its own"
    if layer.folds:
        return "something is folded into its weight"
    if weight.spec.bits not in range(2, 9) or not _even(weight) or overrides(weight.estimator, "decode"):
        return "levels that are not evenly spaced around 0"
    if inputs is not None:
        if not _even(inputs) or inputs.spec.bits != 8 or overrides(inputs.estimator, "transform", "assign", "decode"):
            return "inputs that are not rounded to 8 evenly spaced bits around 0"
        if not inputs.spec.dynamic and inputs.low != -128:
            return "inputs without the most negative code"
        if not inputs.spec.dynamic and not inputs.ready:
            return "inputs that were never calibrated"
        if inputs.spec.granularity not in ("token", "tensor") or (inputs.spec.dynamic and not inputs.observer.covers):
            return "inputs whose range is not a row's largest magnitude"
        if inputs.spec.dynamic and inputs.spec.granularity != "token":
            return "inputs whose range is not a row's largest magnitude"
    return ""


def _even(quantizer: FakeQuantizer) -> bool:
    plain = quantizer.table is None and quantizer.grid.zero in (None, 0) and not quantizer.range.affine
    return plain and bool(quantizer.spec.symmetric) and quantizer.spec.grid == "int"


def _stored(layer: QuantLayer) -> StoredLinear:
    weight, bias = layer.folded()
    codes, scale, _, _ = layer.weight_quant.stored(weight)
    scale = scale.expand(len(codes)).unsqueeze(1) if scale.ndim == 1 else scale
    inputs = None
    if layer.input_quant is not None:
        q = layer.input_quant
        fixed = None if q.spec.dynamic else q.range.scale(q).detach().reshape(1).clone()
        inputs = InputRule(fixed, 127.5 if TARGETS[q.target].reader_scale else 127.0)
    bits = int(layer.weight_quant.spec.bits)
    return StoredLinear(codes, scale.detach(), bits, None, None if bias is None else bias.detach(), inputs)
