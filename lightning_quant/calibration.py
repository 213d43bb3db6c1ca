"""Open the observers, show them data, close them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_quant import distributed, zero
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.bypass import evaluating
from lightning_quant.errors import explain
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer


def open_observers(model: nn.Module, on: bool) -> None:
    """Let the static activation quantizers note ranges in their forwards, or stop them."""
    for _, q in quantizers(model):
        q.observing = on and not (q.is_weight or q.spec.dynamic or q.observer.data_free)


def commit_ranges(model: nn.Module) -> None:
    """Reduce over ranks what was noted since the last commit and take it into the ranges."""
    open_ones = [q for _, q in quantizers(model) if q.observing or q.noted is not None]
    if distributed.active():
        for largest in (True, False):
            _reduce([q for q in open_ones if math.isinf(q.observer.pool) == largest], largest)
    with zero.written(p for q in open_ones for p in q.parameters()):
        for q in open_ones:
            q.commit()


def _reduce(group: list[FakeQuantizer], largest: bool) -> None:
    """Join what all ranks noted; one that saw no data (an expert without tokens) takes part with nothing."""
    if not group:
        return
    empty = torch.full((3,), -math.inf if largest else 0.0, dtype=torch.float64, device=group[0].device)
    rows = torch.stack([empty if q.noted is None else q.noted.to(empty) for q in group])
    for q, noted in zip(group, distributed.reduce(rows, largest), strict=True):
        q.noted = noted.to(q.device) if noted[2] > 0 else None


@torch.no_grad()
def fit_weights(model: nn.Module, missing: bool = False) -> None:
    """Read static weight ranges off the weights as they are now, as ``attach`` does; sharded ones are gathered.

    Args:
        model: A model with quantizers.
        missing: Only those that have none yet, after ``attach(..., fit=False)``.
    """
    with torch.no_grad(), evaluating(model):  # without the dropout of adapters
        for _, layer in quant_layers(model):
            if missing and layer.weight_quant.ready:
                continue
            with zero.gathered(layer.sources()), zero.written(layer.weight_quant.parameters()):
                layer.weight_quant.fit_range(distributed.whole(layer.folded()[0]))


def calibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Set static activation ranges from data, without training.

    Args:
        model: A model with quantizers; left in the mode it was in.
        batches: Each a mapping (keyword arguments), a tuple or list (positional), or one tensor.

    Returns:
        How many batches were seen.  Under a process group every rank must pass the same number.
    """
    training = model.training
    model.eval()
    open_observers(model, True)
    seen = 0
    try:
        with torch.no_grad():
            for batch in track(batches, "calibrating"):
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, (tuple, list)):
                    model(*batch)
                else:
                    model(batch)
                commit_ranges(model)
                seen += 1
    finally:
        open_observers(model, False)
        model.train(training)
    if seen == 0:
        raise ValueError(explain("calibrate", "at least one batch", 0, "Pass representative inputs."))
    return seen
