"""Prove that an ONNX export computes what training computed: integers, scales, every layer, the outputs.

Two programs that sum floats in different orders round a few activations in a million to different sides of the middle
between two codes, and in a deep network each of those moves others.  So every layer of the trained model is handed the
values that onnxruntime computed for its input.  What remains is float error, layer by layer; how many activations the
trained model would have rounded differently is counted, and must be few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.onnx_inputs import example_inputs
from lightning_quant.export.onnx_qdq import stored_weight, zero_point
from lightning_quant.export.onnx_runtime import constants, read_model, run_onnxruntime
from lightning_quant.export.onnx_trace import QUANTIZER
from lightning_quant.export.stored import unequal
from lightning_quant.export.verdict import LayerCheck, VerifyReport
from lightning_quant.export.writer import float_tensors
from lightning_quant.layers import QuantLayer

FLOAT_ERROR = 1e-5  # of a layer's largest output
BOUNDARY = 1e-3  # share of activations that float error may put on the other side of a boundary


@torch.no_grad()
def verify_onnx(
    path: Path, trained: nn.Module, inputs: Any, tolerance: float | None, logits: bool = True
) -> VerifyReport:
    """Compare an ONNX export, run by onnxruntime without graph optimization, with the model that was trained.

    Args:
        path: The export.
        trained: The model with its quantizers, in evaluation mode.
        inputs: As ``export`` takes them.
        tolerance: Largest difference of an output that counts as equal; None: 1e-5 of the largest output, at least 1.
        logits: Must be True: contents are read off a run.

    Raises:
        ValueError: ``logits`` is False.
    """
    if not logits:
        expected, cure = "logits=True for ONNX", "Its layers are compared in a run of onnxruntime."
        raise ValueError(explain("verify", expected, "logits=False", cure))
    args, kwargs = example_inputs(trained, inputs, drawn=(2, 32))
    model, stored = read_model(path), constants(path)
    layers = dict(quant_layers(trained))
    contents = {p: _compare(stored, p, layer, layers) for p, layer in layers.items()}
    given, made = _values(model.graph, trained)
    theirs = run_onnxruntime(path, kwargs or args, also={*given.values(), *made.values()})
    run = _HandedRun(layers, {p: theirs[name] for p, name in given.items()})
    with _without_autocast(trained):
        output = run(trained, args, kwargs)
    first = output
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    gap = (first.cpu() - theirs[model.graph.output[0].name]).abs()
    checks, other = [], []
    for p in [*run.outputs, *(p for p in layers if p not in run.outputs)]:
        apart = 0.0
        if p in run.outputs and p in made:
            apart = float((run.outputs[p] - theirs[made[p]]).abs().max())
            if apart > FLOAT_ERROR * max(1.0, float(run.outputs[p].abs().max())):
                other.append(f"{p}'s output")
        checks.append(LayerCheck(p, *contents[p], apart))
    other += _floats(stored, trained) + _ranges(stored, trained, layers)
    if run.moved > BOUNDARY * run.rounded:
        other.append("rounding of activations")
    note = f"{run.moved} of {run.rounded} activations lie so near a rounding boundary that the two sides differ there"
    if tolerance is None:
        tolerance = FLOAT_ERROR * max(1.0, float(first.abs().max()))
    return VerifyReport(str(path), "onnx", float(gap.max()), float(gap.mean()), tolerance, checks, other, [note])


class _HandedRun:
    """A forward whose layers, and what else rounds activations, get their quantized inputs from elsewhere.

    Args:
        layers: By path.
        inputs: Quantized activations, real, by the path of their quantizer, of some of them.

    Attributes:
        outputs: What each layer made of its input, in the order they ran.
        moved: How many activations the model's own quantizers would have put on another code.
        rounded: How many there were.
    """

    def __init__(self, layers: dict[str, QuantLayer], inputs: dict[str, Tensor]) -> None:
        self.layers, self.inputs = layers, inputs
        self.outputs: dict[str, Tensor] = {}
        self.moved = self.rounded = 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model once."""
        handles = [layer.register_forward_hook(self._keep(path)) for path, layer in self.layers.items()]
        handles += [model.get_submodule(path).register_forward_hook(self._hand_over(path)) for path in self.inputs]
        device = next(model.parameters()).device
        try:
            moved = [v.to(device) if isinstance(v, Tensor) else v for v in (*args, *kwargs.values())]
            return model(*moved[: len(args)], **dict(zip(kwargs, moved[len(args) :], strict=True)))
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.outputs[path] = output.detach().clone().cpu()  # an activation in place would change it

        return hook

    def _hand_over(self, path: str) -> Any:
        def hook(quantizer: Any, args: Any, output: Tensor) -> Tensor:
            value = self.inputs[path].to(output.device)
            self.moved += int(((value - output).abs() > quantizer.range.scale(quantizer) / 2).sum())
            self.rounded += value.numel()
            return value

        return hook


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """After training in mixed precision accelerate leaves a forward on the model that turns autocast on."""
    left = model.__dict__.get("forward")
    if "_original_forward" in model.__dict__:
        model.forward = model._original_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        if left is not None:
            model.forward = left


def _values(graph: Any, trained: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Names of the values that quantizers of activations make, where they are called once, and layers' outputs.

    The exporter computes once what several quantizers make of one value alike; a layer then reads another's.
    """
    layers, own = dict(quant_layers(trained)), {path for path, q in quantizers(trained) if not q.is_weight}
    made: dict[str, list[str]] = {}
    outputs: dict[str, str] = {}
    read: dict[str, list[str]] = {}
    for node in graph.node:
        quantizer = next((note.value for note in node.metadata_props if note.key == QUANTIZER), "")
        path = node.name.rpartition("/")[0]
        if quantizer in own and node.op_type == "DequantizeLinear":
            made.setdefault(quantizer, []).append(node.output[0])
        elif not quantizer and path in layers:
            outputs[path] = node.output[0]
            read.setdefault(f"{path}.input_quant" if path else "input_quant", []).extend(node.input)
    known = {name for names in made.values() for name in names}
    for quantizer in own & read.keys() - made.keys():
        made[quantizer] = [name for name in read[quantizer] if name in known]
    return {quantizer: names[0] for quantizer, names in made.items() if len(names) == 1}, outputs


def _floats(stored: dict[str, Tensor], trained: nn.Module) -> list[str]:
    """Float tensors stored under their own name as others; what the exporter has computed with is seen in outputs."""
    tensors = ((name, tensor) for name, tensor, layer in float_tensors(trained) if layer is None and name in stored)
    return [name for name, tensor in tensors if unequal(stored[name], tensor.detach())]


def _ranges(stored: dict[str, Tensor], trained: nn.Module, layers: dict[str, QuantLayer]) -> list[str]:
    """Quantizers beside those of layers (operators', keys' and values') that are stored with another range."""
    inputs = {id(layer.input_quant) for layer in layers.values()}
    found = []
    for path, q in quantizers(trained):
        if not q.is_weight and id(q) not in inputs and f"{path}.scale" in stored:
            pairs = (("scale", q.range.scale(q).reshape(())), ("zero", zero_point(q)))
            found += [path] * any(unequal(stored[f"{path}.{part}"], value.detach()) > 0 for part, value in pairs)
    return found


def _compare(
    stored: dict[str, Tensor], path: str, layer: QuantLayer, layers: dict[str, QuantLayer]
) -> tuple[int, float]:
    """Integers (zero points included) that differ from the trained ones, and the largest difference of a scale."""
    start = f"{path}." if path else ""
    codes, scale, zero, _ = stored_weight(layer)
    pairs = {"weight_quant.codes": codes, "weight_quant.scale": scale, "weight_quant.zero": zero}
    q = layer.input_quant
    if q is not None and f"{start}input_quant.scale" in stored:  # equal quantizers of one value are stored once
        pairs |= {"input_quant.scale": q.range.scale(q), "input_quant.zero": zero_point(q)}
    integers, apart = 0, 0.0
    holder = start
    if f"{start}weight_quant.codes" not in stored:  # one tensor of several layers is stored once
        same = [
            p for p, other in layers.items() if other.weight is layer.weight and f"{p}.weight_quant.codes" in stored
        ]
        holder = f"{same[0]}." if same else start
    for name, value in pairs.items():
        found = stored.get((holder if name.startswith("weight") else start) + name)
        if found is None or found.numel() != value.numel():
            where, expected = str(path), f"{value.numel()} numbers named {start + name}"
            got = "none" if found is None else str(found.numel())
            raise CheckpointError(explain(where, expected, got, "It was exported from another model; export again."))
        gap = (found.double().flatten() - value.detach().cpu().double().flatten()).abs()
        if name.endswith("scale"):
            apart = max(apart, float(gap.max()))
        else:
            integers += int((gap > 0).sum())
    return integers, apart
