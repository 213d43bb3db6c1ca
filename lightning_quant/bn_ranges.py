"""Ranges of layers' inputs from batch normalizations before them, by following intervals through the traced model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

from lightning_quant.errors import explain
from lightning_quant.graph import Flow
from lightning_quant.observers.bn_stats import promised

if TYPE_CHECKING:
    from lightning_quant.plan import LayerPlan

PROMISED = "bn_stats"
Interval = tuple[float, float]
KEEP = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
)
KEEP_CALLS = {
    *("flatten", "view", "reshape", "contiguous", "permute", "transpose", "squeeze", "mean", "amax"),
    *(torch.flatten, torch.mean, torch.squeeze, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
}
RELU = {"relu", "relu_", F.relu, torch.relu, torch.relu_}
ADD = {"add", "add_", operator.add, operator.iadd, torch.add}


def ranges_from_norms(model: nn.Module, traced: Flow, layers: Sequence[str]) -> dict[str, Interval]:
    """What batch normalizations promise of the inputs of these layers.

    Args:
        model: In float, traced.
        traced: Its ``flow``.
        layers: Paths.

    Returns:
        Path -> (low, high), real; layers whose input nothing bounds are left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, list[Interval | None]] = {}
    for prefix, graph in traced.parts.items():
        head = f"{prefix}." if prefix else ""
        known: dict[fx.Node, Interval | None] = {}
        for node in graph.nodes:
            inputs = [known.get(n) for n in node.all_input_nodes]
            if node.op == "call_module":
                path = head + str(node.target)
                found.setdefault(path, []).append(inputs[0] if inputs else None)
                known[node] = _after_module(modules[path], inputs)
            elif node.op in ("call_function", "call_method"):
                known[node] = _after_call(node, inputs)
    bounded: dict[str, Interval] = {}
    for path in layers:
        ends = [e for e in found.get(path, [None]) if e is not None]
        if ends and len(ends) == len(found[path]):
            bounded[path] = (min(low for low, _ in ends), max(high for _, high in ends))
    return bounded


def with_promised_ranges(model: nn.Module, layers: Sequence[LayerPlan], traced: Flow) -> list[LayerPlan]:
    """The layers, those whose inputs ask for ``bn_stats`` with the ends of their ranges, or else observing data.

    Args:
        model: In float, traced.
        layers: With resolved specs.
        traced: Its ``flow``.

    Raises:
        ValueError: Asked for a weight, or for inputs whose range is not static.
    """
    ends, found = ranges_from_norms(model, traced, [p.path for p in layers]), []
    for layer in layers:
        activation = layer.activation
        if layer.weight.observer == PROMISED:
            cure = f'Set it for inputs alone: activation=TensorSpec(8, observer="{PROMISED}").'
            raise ValueError(explain(f"{layer.path}.weight: observer", "one that reads weights", PROMISED, cure))
        if activation is None or activation.observer != PROMISED:
            found.append(layer)
        elif activation.dynamic:
            got, cure = f"{PROMISED} with dynamic=True", "Write -static in the scheme, or leave the observer out."
            raise ValueError(explain(f"{layer.path}.input: observer", "a static range", got, cure))
        elif layer.path in ends:
            found.append(replace(layer, ends=ends[layer.path]))
        else:
            found.append(replace(layer, activation=replace(activation, observer="ema")))
    return found


def _after_module(module: Any, inputs: list[Interval | None]) -> Interval | None:
    """The interval of a module's output, None where it is not known."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.weight is None or module.bias is None or module.weight.is_meta:
            one = torch.ones(1)
            return promised(0 * one, one)
        return promised(module.bias.detach().float(), module.weight.detach().float())
    if not inputs or inputs[0] is None:
        return None
    low, high = inputs[0]
    if isinstance(module, nn.ReLU):
        return max(low, 0.0), max(high, 0.0)
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        least, most = float(module.min_val), float(module.max_val)
        return min(max(low, least), most), min(max(high, least), most)
    return inputs[0] if isinstance(module, KEEP) else None


def _after_call(node: fx.Node, inputs: list[Interval | None]) -> Interval | None:
    """The interval of what a function or method returns."""
    if not inputs or any(i is None for i in inputs):
        return None
    known = [i for i in inputs if i is not None]
    low, high = known[0]
    target: Any = node.target
    if target in RELU:
        return max(low, 0.0), max(high, 0.0)
    if target is F.relu6:
        return min(max(low, 0.0), 6.0), min(max(high, 0.0), 6.0)
    if target in ADD and len(node.args) == 2 and not node.kwargs:
        times = 2 if len(known) == 1 else 1  # x + x
        both = all(isinstance(a, fx.Node) for a in node.args)
        return (times * sum(i[0] for i in known), times * sum(i[1] for i in known)) if both else None
    if target is torch.cat:
        return min(i[0] for i in known), max(i[1] for i in known)
    return known[0] if target in KEEP_CALLS and len(known) == 1 else None


__all__ = ["PROMISED", "Interval", "ranges_from_norms", "with_promised_ranges"]
