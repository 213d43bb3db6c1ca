"""Bias correction: what rounding a weight adds to a layer's mean output is taken off its bias."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.equalize import layers_before_norms
from lightning_quant.transforms.grids import layer_grids
from lightning_quant.transforms.observe import channels_last, means, watch_inputs
from lightning_quant.transforms.outputs import add_to_output, applied_to, sums_over_inputs
from lightning_quant.transforms.pairs import as_batches, find_pairs, is_consumer, whole
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import Applied, TransformReport, difference


def relu_mean(beta: Tensor, gamma: Tensor) -> Tensor:
    """``gamma N(-beta/gamma) + beta (1 - Phi(-beta/gamma))``: mean of ReLU of a normal value.

    Args:
        beta: Means, real.
        gamma: Standard deviations, real.

    >>> relu_mean(torch.tensor([0.5]), torch.tensor([2.0]))
    tensor([1.0727])
    """
    sigma = gamma.abs().clamp(min=1e-12)
    z = beta / sigma
    return sigma * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) + beta * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


@computed_in_float32
@torch.no_grad()
def correct_bias(
    model: nn.Module, batches: Iterable[Any], config: QuantConfig, analytic: bool = False
) -> TransformReport:
    """``b -= E[(Q(W) - W) x]`` for every layer whose weight will be rounded, in place.

    The mean of a layer's rounded output is then that of the float one.  What holds the correction is the layer's bias,
    or the running mean of the batch normalization right after it.  The float function changes by what is taken off.

    Args:
        model: In float, before ``attach``, after whatever moves weights (``equalize`` above all).
        batches: Calibration data.
        config: Whose weight specs are followed.
        analytic: Take E[x] from the batch normalization before the layer, ReLU between them or not, instead of data
            (of which the first batch then tells whether there is one); layers without it are left alone.  Borders
            padded with zeros are not accounted for.

    Source: Nagel et al., ICCV 2019, arXiv:1906.04721.
    Deviation: inputs are those of the float model throughout.
    """
    data, grids = as_batches(batches), layer_grids(model, config)
    layers = {p: model.get_submodule(p) for p in grids}
    layers = {p: layer for p, layer in layers.items() if is_consumer(layer)}
    after = {layer: norm for norm, layer in layers_before_norms(model, data[0]).items()}
    deltas = {p: grids[p].weight(layer.weight) - layer.weight for p, layer in layers.items()}  # type: ignore[arg-type, operator]
    report, start = TransformReport(), whole(model, data[0])[1]()
    if analytic:
        inputs = _means_before(model, data[0])
        shifts = {p: sums_over_inputs(layers[p], deltas[p], inputs[p]) for p in layers if p in inputs}
        report.refused = {p: "no batch normalization before it" for p in layers if p not in inputs}
    else:
        shifts = means(model, data, layers, lambda p, layer, x: channels_last(layer, applied_to(layer, deltas[p], x)))
    for path, shift in shifts.items():
        why = add_to_output(model, path, after, -shift)
        if why is None:
            report.applied.append(Applied(path, (), "correct_bias", 0.0))
        else:
            report.refused[path] = why
    moved = difference(start, whole(model, data[0])[1]()) if report.applied else 0.0
    report.applied = [Applied(a.producer, (), a.what, moved) for a in report.applied]
    return report


def _means_before(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """E[x] of layers that read a batch normalization, directly or through a ReLU."""
    lowest: dict[str, float] = {}
    pairs = find_pairs(model, batch).found
    read = {path for pair in pairs for path in pair.consumers}
    watch_inputs(model, [batch], read, lambda path, layer, x: lowest.setdefault(path, float(x.min())))
    found: dict[str, Tensor] = {}
    for pair in pairs:
        norm: Any = model.get_submodule(pair.producer)
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for path, index in pair.consumers.items():
                own = index.to(norm.bias.device)
                beta, gamma = norm.bias[own], norm.weight[own]
                found[path] = relu_mean(beta, gamma) if lowest[path] >= 0 else beta
    return found


__all__ = ["correct_bias", "relu_mean"]
