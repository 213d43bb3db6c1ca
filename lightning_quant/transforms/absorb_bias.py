"""High biases move on: a channel that is nearly always positive gives its constant part to the layer after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.transforms.equalize import layers_before_norms
from lightning_quant.transforms.outputs import add_to_output, sums_over_inputs
from lightning_quant.transforms.pairs import as_batches, find_pairs, whole
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import Applied, TransformReport, difference

SIGMAS = 3.0
LIMIT = 0.05  # of the output's largest value: a change beyond it is no approximation any more


def absorbed(beta: Tensor, gamma: Tensor) -> Tensor:
    """``max(0, beta - 3 |gamma|)``: what a normal value of that mean and deviation exceeds 99.865 % of the time.

    >>> absorbed(torch.tensor([5.0, 1.0]), torch.tensor([1.0, -1.0]))
    tensor([2., 0.])
    """
    return (beta - SIGMAS * gamma.abs()).clamp(min=0)


@computed_in_float32
@torch.no_grad()
def absorb_bias(model: nn.Module, batches: Iterable[Any]) -> TransformReport:
    """Take ``c = max(0, beta - 3 gamma)`` off a batch normalization's bias and add ``W c`` after its readers, in place.

    **An approximation**: exact where the value before the ReLU exceeds c (for 99.865 % of a normal distribution) and
    away from borders that are padded with zeros.  The report says what changed; beyond 5 % of the output's largest
    value a site is put back.

    Args:
        model: In float, before ``attach``, and after ``equalize``.
        batches: Data, of which the first is used.

    Source: Nagel et al., ICCV 2019, arXiv:1906.04721.
    """
    batch = as_batches(batches)[0]
    pairs, norms = find_pairs(model, batch), layers_before_norms(model, batch)
    after = {layer: norm for norm, layer in norms.items()}
    report = TransformReport(refused=dict(pairs.refused))
    part = whole(model, batch)[1]
    if not any(isinstance(model.get_submodule(p.producer), nn.modules.batchnorm._BatchNorm) for p in pairs.found):
        report.refused[type(model).__name__] = "no layer reads a batch normalization"
    for pair in pairs.found:
        producer: Any = model.get_submodule(pair.producer)
        if not isinstance(producer, nn.modules.batchnorm._BatchNorm):
            continue
        c = absorbed(producer.bias, producer.weight)
        if not bool(c.any()):
            report.refused[pair.producer] = "no bias exceeds three times its scale"
            continue
        kept, start = {k: v.clone() for k, v in model.state_dict().items()}, part()
        producer.bias.sub_(c)
        for path, index in pair.consumers.items():
            layer: Any = model.get_submodule(path)
            shift = sums_over_inputs(layer, layer.weight, c[index.to(c.device)])
            why = add_to_output(model, path, after, shift)
            if why is not None:
                report.refused[pair.producer] = f"{path}: {why}"
                break
        moved = difference(start, part())
        if pair.producer not in report.refused and moved > LIMIT:
            report.refused[pair.producer] = f"the output would change by {moved:.1e}"
        if pair.producer in report.refused:
            model.load_state_dict(kept)
        else:
            report.applied.append(Applied(pair.producer, tuple(pair.consumers), "absorb_bias", moved))
    return report


__all__ = ["absorb_bias", "absorbed"]
