"""Running statistics of batch normalization, taken anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_quant import distributed
from lightning_quant.bypass import evaluating
from lightning_quant.norms import FoldedBatchNorm
from lightning_quant.progress import track
from lightning_quant.transforms.pairs import as_batches, call, whole
from lightning_quant.transforms.rescale import Applied, TransformReport, difference


@torch.no_grad()
def reestimate_bn(model: nn.Module, batches: Iterable[Any]) -> TransformReport:
    """Replace running means and variances by their averages over these batches, in place.

    For a float model, whose statistics are old, and for a quantized one, whose activations are others than those the
    statistics were taken from: with weights that jump between two codes they lag behind.  All else is in evaluation
    mode, so that nothing drops out.  The function changes; the report says by how much.

    Args:
        model: In float, or with quantizers.
        batches: Data, as large as training's.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv:2203.11086.
    """
    data, report = as_batches(batches), TransformReport()
    norms: dict[str, Any] = {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, FoldedBatchNorm)) and m.running_mean is not None
    }
    if not norms:
        report.refused[type(model).__name__] = "no batch normalization with running statistics"
        return report
    start = whole(model, data[0])[1]()
    kept = {path: {k: norm.__dict__.get(k) for k in ("momentum", "follows")} for path, norm in norms.items()}
    with evaluating(model):
        for norm in norms.values():
            norm.num_batches_tracked.zero_()
            norm.momentum, norm.training = None, True  # None: the plain average
            if isinstance(norm, FoldedBatchNorm):
                norm.follows = True
        try:
            for batch in track(data, "statistics of batch normalization"):
                call(model, batch)
        finally:
            for path, norm in norms.items():
                norm.training = False
                norm.__dict__.update({k: v for k, v in kept[path].items() if k in norm.__dict__})
    for norm in norms.values():
        norm.running_mean.copy_(distributed.mean(norm.running_mean.clone()))
        norm.running_var.copy_(distributed.mean(norm.running_var.clone()))
    moved = difference(start, whole(model, data[0])[1]())
    report.applied = [Applied(path, (), "reestimate_bn", moved) for path in norms]
    return report


__all__ = ["reestimate_bn"]
