"""ONNX operators that only move elements: scales go where their integers go.

The functions of ``MOVES`` take a plain tensor and are applied to integers and, where there are several, to scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant.export.integer_values import Scaled, Step, Value, ends, moved


def pad(step: Step, x: Value, pads: Tensor, constant: Tensor | None = None, axes: Tensor | None = None) -> Value:
    """Pad with zeros."""
    if step.settings.get("mode", "constant") != "constant" or (constant is not None and float(constant) != 0):
        raise step.refuse("padding with 0", "another value or mode", "Pad with zeros.")
    assert x is not None
    shape = (x.integer if isinstance(x, Scaled) else x).shape
    dimensions = range(len(shape)) if axes is None else [int(a) % len(shape) for a in axes]
    both = [0] * (2 * len(shape))
    for i, axis in enumerate(dimensions):
        both[axis], both[len(shape) + axis] = int(pads[i]), int(pads[len(dimensions) + i])
    places = ends(both)
    return moved(x, lambda t: F.pad(t, places), lambda scale: F.pad(scale, places, value=1.0))


def concatenate(step: Step, *values: Value) -> Value:
    """Concat: integers beside each other, each with its scale."""
    axis = step.settings["axis"]
    tensors = [v for v in values if isinstance(v, Tensor)]
    if len(tensors) == len(values):
        return torch.cat(tensors, axis)
    parts = [step.scaled(v) for v in values]
    scales = [p.scale for p in parts]
    shared = scales[0].numel() == 1 and all(torch.equal(s.flatten(), scales[0].flatten()) for s in scales)
    scale = scales[0].reshape(()) if shared else torch.cat([p.scale.expand(p.integer.shape) for p in parts], axis)
    return Scaled(torch.cat([p.integer for p in parts], axis), scale, max(p.bound for p in parts))


def reshape(step: Step, t: Tensor, shape: Tensor) -> Tensor:
    """Reshape; 0 keeps a dimension."""
    sizes = [t.shape[i] if n == 0 and not step.settings.get("allowzero") else n for i, n in enumerate(shape.tolist())]
    return t.reshape(sizes)


def flatten(step: Step, t: Tensor) -> Tensor:
    """Flatten to a matrix."""
    return t.reshape(math.prod(t.shape[: step.settings.get("axis", 1)]), -1)


def transpose(step: Step, t: Tensor) -> Tensor:
    """Transpose."""
    return t.permute(step.settings.get("perm", list(range(t.ndim))[::-1]))


def squeeze(step: Step, t: Tensor, axes: Tensor | None = None) -> Tensor:
    """Squeeze."""
    return t.squeeze() if axes is None else t.squeeze(tuple(axes.tolist()))


def unsqueeze(step: Step, t: Tensor, axes: Tensor) -> Tensor:
    """Unsqueeze."""
    ndim = t.ndim + axes.numel()
    for axis in sorted(int(a) % ndim for a in axes):
        t = t.unsqueeze(axis)
    return t


def expand(step: Step, t: Tensor, shape: Tensor) -> Tensor:
    """Expand."""
    sizes = [1] * (t.ndim - shape.numel()) + shape.tolist()
    return t.expand([-1 if n == 1 and i >= len(sizes) - t.ndim else n for i, n in enumerate(sizes)])


def cut(step: Step, t: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Any = None) -> Tensor:
    """Slice with positive steps."""
    places = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    if min(strides) < 0:
        raise step.refuse("positive steps", strides, "Run the file in onnxruntime.")
    slices = [slice(None)] * t.ndim
    for axis, start, end, stride in zip(places, starts.tolist(), ends.tolist(), strides, strict=True):
        slices[axis] = slice(start, end, stride)
    return t[tuple(slices)]


def gather(step: Step, t: Tensor, indices: Tensor) -> Tensor:
    """Gather."""
    axis = step.settings.get("axis", 0)
    taken = t.index_select(axis, indices.reshape(-1))
    return taken.reshape(*t.shape[:axis], *indices.shape, *t.shape[axis + 1 :])


MOVES: dict[str, Callable[..., Tensor]] = {
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "Identity": lambda step, t: t,
    "Reshape": reshape,
    "Slice": cut,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
