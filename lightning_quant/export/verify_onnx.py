"""Prove that an ONNX export computes what training computed: integers, scales, every layer, the outputs.

Two programs that sum floats in different orders round a few activations in a million to different sides of the middle
between two codes, and in a deep network each of those moves others.  So every layer of the trained model is handed the
values that onnxruntime computed for its input.  What remains is float error, layer by layer; how many activations the
trained model would have rounded differently is counted, and must be few.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.attach import quant_layers
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.onnx_qdq import QUANTIZER, example_inputs, stored_weight, zero_point
from lightning_quant.export.onnx_runtime import constants, read_model, run_onnxruntime
from lightning_quant.export.verdict import LayerCheck, VerifyReport
from lightning_quant.layers import QuantLayer

FLOAT_ERROR = 1e-5  # of a layer's largest output
BOUNDARY = 1e-3  # share of activations that float error may put on the other side of a boundary


@torch.no_grad()
def verify_onnx(path: Path, trained: nn.Module, inputs: Any, tolerance: float | None) -> VerifyReport:
    """Compare an ONNX export, run by onnxruntime without graph optimization, with the model that was trained.

    Args:
        path: The export.
        trained: The model with its quantizers, in evaluation mode.
        inputs: As ``export`` takes them.
        tolerance: Largest difference of an output that counts as equal; None: 1e-5 of the largest output, at least 1.
    """
    args, kwargs = example_inputs(trained, inputs)
    model, stored = read_model(path), constants(path)
    layers = dict(quant_layers(trained))
    contents = {p: _compare(stored, p, layer) for p, layer in layers.items()}
    given, made = _values(model.graph, layers)
    theirs = run_onnxruntime(path, kwargs or args, also={*given.values(), *made.values()})
    run = _HandedRun(layers, {p: theirs[name] for p, name in given.items()})
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
    if run.moved > BOUNDARY * run.rounded:
        other.append("rounding of activations")
    note = f"{run.moved} of {run.rounded} activations lie so near a rounding boundary that the two sides differ there"
    if tolerance is None:
        tolerance = FLOAT_ERROR * max(1.0, float(first.abs().max()))
    return VerifyReport(str(path), "onnx", float(gap.max()), float(gap.mean()), tolerance, checks, other, [note])


class _HandedRun:
    """A forward whose layers get inputs from elsewhere.

    Args:
        layers: By path.
        inputs: Quantized inputs, real, of some of them.

    Attributes:
        outputs: What each layer made of its input, in the order they ran.
        moved: How many inputs the layer's own quantizer would have put on another code.
        rounded: How many there were.
    """

    def __init__(self, layers: dict[str, QuantLayer], inputs: dict[str, Tensor]) -> None:
        self.layers, self.inputs = layers, inputs
        self.outputs: dict[str, Tensor] = {}
        self.moved = self.rounded = 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model once."""
        handles = []
        for path, layer in self.layers.items():
            handles.append(layer.register_forward_hook(self._keep(path)))
            if path in self.inputs and layer.input_quant is not None:
                handles.append(layer.input_quant.register_forward_hook(self._hand_over(path)))
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


def _values(graph: Any, layers: dict[str, QuantLayer]) -> tuple[dict[str, str], dict[str, str]]:
    """Names of the values that are a layer's quantized input, where it has one only, and its output."""
    inputs: dict[str, list[str]] = {}
    outputs = {}
    for node in graph.node:
        quantizer = next((note.value for note in node.metadata_props if note.key == QUANTIZER), "")
        path, _, last = quantizer.rpartition(".")
        if last == "input_quant" and node.op_type == "DequantizeLinear":
            inputs.setdefault(path, []).append(node.output[0])
        elif node.name.rpartition("/")[0] in layers:
            outputs[node.name.rpartition("/")[0]] = node.output[0]
    return {p: names[0] for p, names in inputs.items() if len(names) == 1 and p in layers}, outputs


def _compare(stored: dict[str, Tensor], path: str, layer: QuantLayer) -> tuple[int, float]:
    """Integers (zero points included) that differ from the trained ones, and the largest difference of a scale."""
    start = f"{path}." if path else ""
    codes, scale, zero, _ = stored_weight(layer)
    pairs = {"weight_quant.codes": codes, "weight_quant.scale": scale, "weight_quant.zero": zero}
    q = layer.input_quant
    if q is not None and f"{start}input_quant.scale" in stored:  # equal quantizers of one value are stored once
        pairs |= {"input_quant.scale": q.range.scale(q), "input_quant.zero": zero_point(q)}
    integers, apart = 0, 0.0
    for name, value in pairs.items():
        found = stored.get(start + name)
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
