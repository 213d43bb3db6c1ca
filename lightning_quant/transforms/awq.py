"""AWQ: channels that matter, by their activations, get finer steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.clip import clip_weights
from lightning_quant.transforms.grids import layer_grids
from lightning_quant.transforms.observe import input_absmean
from lightning_quant.transforms.pairs import Pair, as_batches, find_pairs
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import TransformReport, rescale
from lightning_quant.transforms.trial import errors

SMALLEST = 1e-4


def awq_factors(magnitudes: Tensor, a: float) -> Tensor:
    """``mean|X_j|^a``, divided by the root of its largest times its smallest value.

    >>> awq_factors(torch.tensor([1.0, 4.0, 16.0]), 0.5)
    tensor([0.5000, 1.0000, 2.0000])
    """
    s = magnitudes.clamp(min=SMALLEST) ** a
    return s / (s.max() * s.min()).sqrt()


@computed_in_float32
@torch.no_grad()
def awq(
    model: nn.Module, batches: Iterable[Any], config: QuantConfig, points: int = 20, clip: bool = False
) -> TransformReport:
    """Scale each producer's channels by ``mean|X|^a``, with the a that hurts its block least, in place.

    ``a`` is one of ``0, 1/points, ..., (points - 1)/points``; a = 0 leaves a site alone.  The error is that of the
    block's output on the first batch, with the weights of the producer's readers rounded as training will round them.

    Args:
        model: In float, before ``attach``.
        batches: Calibration data, each a mapping, tuple, list, tensor or ``Inputs``.
        config: Whose weight specs are followed.
        points: How many exponents are tried.
        clip: Then clip weights as well, which is an approximation: see ``clip_weights``.

    Raises:
        ValueError: Fewer than one point, or no batch.

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024,
    arXiv:2306.00978.
    Deviation: the error is always that of the whole block, and activations stay in float where the authors' code
    takes the output of attention or of the feed-forward part.
    """
    if points < 1:
        raise ValueError(explain("awq.points", "1 or more", points, "Use for example 20."))
    data, grids = as_batches(batches), layer_grids(model, config)
    pairs = find_pairs(model, data[0])
    report = TransformReport(refused=dict(pairs.refused))
    mean = input_absmean(model, data, {path for pair in pairs.found for path in pair.consumers})
    for pair in pairs.found:
        if not any(path in grids for path in pair.consumers):
            report.refused[pair.producer] = "what reads it stays in float"
            continue
        trials = [awq_factors(_of_producer(pair, mean), i / points) for i in range(points)]
        found = errors(model, pair, trials, grids, inputs=False)
        best = min(range(points), key=found.__getitem__)
        if best:
            rescale(model, pair, trials[best], "awq", report)
        else:
            report.refused[pair.producer] = "no exponent lowers the error of its block"
    if clip:
        report.add(clip_weights(model, data, config))
    return report


def _of_producer(pair: Pair, mean: dict[str, Tensor]) -> Tensor:
    """Mean magnitudes of what its readers read, per channel of the producer."""
    total, count = torch.zeros(pair.channels), torch.zeros(pair.channels)
    for path, index in pair.consumers.items():
        values = mean[path].cpu().float()
        total.scatter_add_(0, index, values)
        count.scatter_add_(0, index, torch.ones_like(values))
    return total / count.clamp(min=1)


__all__ = ["awq", "awq_factors"]
