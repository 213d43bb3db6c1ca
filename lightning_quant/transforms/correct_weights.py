"""Weights whose rounded values keep the mean and the spread of the float ones, channel by channel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.grids import LayerGrid, layer_grids
from lightning_quant.transforms.pairs import as_batches, whole
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import Applied, TransformReport, difference


def corrected(rounded: Tensor, weight: Tensor) -> Tensor:
    """``xi (w_q + mu)`` per row, with mu the means' difference and xi the ratio of the norms around the mean.

    The result has each row's mean and norm of the float weight, up to xi on the mean.

    Args:
        rounded: w_q, (rows, n), real.
        weight: w, (rows, n), real.
    """
    mu = weight.mean(dim=1, keepdim=True) - rounded.mean(dim=1, keepdim=True)
    spread = (rounded - rounded.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
    xi = (weight - weight.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True) / spread.clamp(min=1e-12)
    return torch.where(spread > 1e-12, xi, torch.ones_like(xi)) * (rounded + mu)


@computed_in_float32
@torch.no_grad()
def correct_weights(model: nn.Module, batches: Iterable[Any], config: QuantConfig) -> TransformReport:
    """Shift and stretch each output channel so that its rounded weights have the float mean and norm, in place.

    ``w <- xi (w + mu)`` with mu and xi of ``corrected``, kept for the channels whose rounded weights come nearer to
    the float mean and norm by it.  The float function changes, by less than a step of the grid; the report says how
    much.

    Args:
        model: In float, before ``attach``.
        batches: Data, of which the first tells what changes.
        config: Whose weight specs are followed.

    Source: Banner, Nahshan, Soudry, "Post training 4-bit quantization of convolutional networks for rapid-deployment",
    NeurIPS 2019, arXiv:1810.05723.
    Deviation: there what is rounded already is corrected, which leaves the grid; here the weights before rounding, so
    that codes and scales are all that ships.
    """
    batch, report = as_batches(batches)[0], TransformReport()
    start = whole(model, batch)[1]()
    for path, grid in layer_grids(model, config).items():
        layer: Any = model.get_submodule(path)
        new, rows = _nearer(layer, grid)
        if rows:
            layer.weight.copy_(new)
            report.applied.append(Applied(path, (), "correct_weights", 0.0))
        else:
            report.refused[path] = "no channel would come nearer to its mean and norm"
    moved = difference(start, whole(model, batch)[1]()) if report.applied else 0.0
    report.applied = [Applied(a.producer, (), a.what, moved) for a in report.applied]
    return report


def _nearer(layer: Any, grid: LayerGrid) -> tuple[Tensor, int]:
    """The layer's weight with the channels replaced that gain by it, and how many they are."""
    weight: Tensor = layer.weight
    across = type(layer).__name__ == "Conv1D" or layer.__class__.__name__.startswith("ConvTranspose")

    def rows(w: Tensor) -> Tensor:
        return (w.transpose(0, 1) if across else w).flatten(1)

    rounded = rows(grid.weight(weight))
    own = rows(weight)
    mu = own.mean(dim=1, keepdim=True) - rounded.mean(dim=1, keepdim=True)
    xi = (corrected(rounded, own).norm(dim=1, keepdim=True) / (rounded + mu).norm(dim=1, keepdim=True)).nan_to_num(1.0)
    moved = xi * (own + mu)
    shape = weight.transpose(0, 1).shape if across else weight.shape
    back = moved.view(shape).transpose(0, 1) if across else moved.view(shape)
    better = _distance(rows(grid.weight(back.contiguous())), own) < _distance(rounded, own)
    chosen = torch.where(better.unsqueeze(1), moved, own).view(shape)
    return (chosen.transpose(0, 1) if across else chosen), int(better.sum())


def _distance(rounded: Tensor, weight: Tensor) -> Tensor:
    """Per row: how far mean and deviation are off, in the same unit."""
    off = rounded.mean(dim=1) - weight.mean(dim=1)
    return off.square() + (rounded.std(dim=1, unbiased=False) - weight.std(dim=1, unbiased=False)).square()


__all__ = ["correct_weights", "corrected"]
