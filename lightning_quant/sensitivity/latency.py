"""Seconds that a layer takes on this machine, on the low-bit kernels of ``lightning_quant.runtime``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.progress import track
from lightning_quant.runtime import convert
from lightning_quant.sensitivity.measures import only

SECONDS = 0.05  # for which a layer is run, at the least

Known = dict[tuple[Any, ...], float]


@torch.no_grad()
def measured(
    layers: Mapping[str, QuantLayer], rows: Mapping[str, int], known: Known, what: str = "timing layers"
) -> dict[str, float]:
    """Median seconds of one call of each layer, in bfloat16, with as many rows as passed.

    Where no kernel has a layer's scheme the runtime computes with the dense weight, and that is what is timed.  Layers
    of one shape and scheme are timed once, and one layer is held in memory beside the model.

    Args:
        layers: By path, with ranges, quantizers off.
        rows: Of the layers' inputs.
        known: What was timed before; added to.
        what: For the progress bar.

    Raises:
        ValueError: A layer that the runtime has no form for, such as a convolution.
    """
    found = {}
    for path, layer in track(list(layers.items()), what):
        count, device = rows.get(path, 1), layer.weight.device
        key = (*layer.weight.shape, layer.bias is None, layer.weight_quant.spec, _inputs(layer), count, str(device))
        if key not in known:
            known[key] = _seconds(path, layer, count)
        found[path] = known[key]
    return found


def _inputs(layer: QuantLayer) -> Any:
    return None if layer.input_quant is None else layer.input_quant.spec


def _seconds(path: str, layer: QuantLayer, rows: int) -> float:
    own = copy.deepcopy(layer)
    with only([q for q in (own.weight_quant, own.input_quant) if q is not None]):
        module: nn.Module = convert(own)
        if isinstance(module, QuantLayer):
            plan: Any = module.runtime_report
            reason = plan.lines[0].reason
            cure = "Give a table of seconds instead: --latency FILE, or latency={path: {scheme: seconds}}."
            raise ValueError(explain(f"latency of {path}", "a layer that the runtime has kernels for", reason, cure))
    x = torch.randn(rows, layer.weight.shape[1], dtype=torch.bfloat16, device=layer.weight.device)
    module(x)
    timer = Timer("module(x)", globals={"module": module, "x": x}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=SECONDS).median)
