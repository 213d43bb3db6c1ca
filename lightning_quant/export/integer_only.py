"""Run an exported ONNX file on integers alone and compare it with onnxruntime.

What a device without floating-point units would compute: the model's inputs are rounded by the first QuantizeLinear,
the last layer's sums are multiplied by their scale, and between the two there are integers only.  See
``integer_operators`` for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.export.integer_operators import apply
from lightning_quant.export.integer_values import Scaled, Step, Value
from lightning_quant.export.onnx_runtime import constants, feeds, read_model, run_onnxruntime


@dataclass(frozen=True)
class IntegerRun:
    """What integers alone gave.

    Attributes:
        outputs: The model's outputs by name, float32, real.
        codes: Stored integers of every quantized activation (behind the Clip of a grid below 8 bits), by name.
    """

    outputs: dict[str, Tensor]
    codes: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Integers alone against onnxruntime, which computes the same file in floats.

    Attributes:
        differing: Share of the stored integers that differ, by activation.
        share: The same over all of them.
        largest: Largest difference of two stored integers.
        outputs: Largest difference of an output, real.
    """

    differing: dict[str, float]
    share: float
    largest: int
    outputs: float


@torch.no_grad()
def run_integer_only(
    path: str | Path, inputs: Any, headroom: bool = True, given: Mapping[str, Tensor] | None = None
) -> IntegerRun:
    """Interpret an exported ONNX file with integer arithmetic.

    Args:
        path: File, or the directory that ``export`` wrote.
        inputs: A tensor, a tuple (in the file's order) or a mapping of names.
        headroom: Round a bias as finely as int32 allows; False: to ``scale_x * scale_w``, as the paper does.
        given: Stored integers by name, to go on with in place of those computed here.

    Raises:
        ValueError: An operator that needs floats between the first rounding and the last layer, a layer that was left
            in float, or sums beyond int32; the node is named.
        CheckpointError: No whole file there.
    """
    import onnx

    model = read_model(path)
    graph = model.graph
    values: dict[str, Value] = {"": None, **feeds(model, inputs), **constants(path)}
    activations = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"} - values.keys()
    codes: dict[str, Tensor] = {}
    for node in graph.node:
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        settings = {k: v.decode() if isinstance(v, bytes) else v for k, v in settings.items()}
        step, name = Step(node.name, node.op_type, settings, headroom), node.output[0]
        value = apply(step, [values[i] for i in node.input])
        if name in activations:
            assert isinstance(value, Tensor)
            codes[name] = value
            value = (given or {}).get(name, value).long()
        values[name] = value
    return IntegerRun({out.name: _real(values[out.name]) for out in graph.output}, codes)


def _real(value: Value) -> Tensor:
    """The one multiplication of floats: sums by their scale."""
    if isinstance(value, Scaled):
        return (value.integer * value.scale).float()
    assert value is not None
    return value


def compare_with_runtime(path: str | Path, inputs: Any, headroom: bool = True, local: bool = False) -> Comparison:
    """How far integers alone are from onnxruntime without graph optimization.

    They differ where a rounded bias or multiplier here, or the order of float sums there, moves a value over the middle
    between two codes.  What such a code leads to in later layers counts too, unless ``local`` is set.

    Args:
        path: As ``run_integer_only``.
        inputs: As ``run_integer_only``.
        headroom: As ``run_integer_only``.
        local: Compute every activation from onnxruntime's integers of the ones before it.
    """
    names = run_integer_only(path, inputs, headroom).codes
    theirs = run_onnxruntime(path, inputs, also=list(names))
    ours = run_integer_only(path, inputs, headroom, given={name: theirs[name] for name in names} if local else None)
    gaps = {name: (code - theirs[name].long()).abs() for name, code in ours.codes.items()}
    count = sum(gap.numel() for gap in gaps.values())
    return Comparison(
        {name: float((gap > 0).double().mean()) for name, gap in gaps.items()},
        sum(int((gap > 0).sum()) for gap in gaps.values()) / max(count, 1),
        max((int(gap.max()) for gap in gaps.values() if gap.numel()), default=0),
        max(float((ours.outputs[name] - theirs[name]).abs().max()) for name in ours.outputs),
    )
