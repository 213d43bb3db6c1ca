"""SmoothQuant: outliers of activations become factors of the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.grids import layer_grids
from lightning_quant.transforms.observe import input_absmax
from lightning_quant.transforms.pairs import as_batches, find_pairs
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import TransformReport, rescale
from lightning_quant.transforms.trial import errors

SMALLEST = 1e-5
SEARCH = "search"
# alpha of the authors' table, by transformers' model_type; what is not here gets 0.5
ALPHAS = {"llama": 0.85, "mistral": 0.8, "mixtral": 0.8, "falcon": 0.6}


def smooth_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """``max|X_j|^alpha / max|W_j|^(1 - alpha)``, both maxima at least 1e-5.

    >>> smooth_factors(torch.tensor([4.0, 1.0, 16.0]), torch.tensor([1.0, 2.0, 0.5]), 0.5)
    tensor([2.0000, 0.7071, 5.6569])
    """
    return inputs.clamp(min=SMALLEST) ** alpha / weights.clamp(min=SMALLEST) ** (1 - alpha)


@computed_in_float32
@torch.no_grad()
def smoothquant(
    model: nn.Module, batches: Iterable[Any], alpha: float | str | None = None, config: QuantConfig | None = None
) -> TransformReport:
    """Balance what activations and weights are hard to quantize in, channel by channel, in place.

    Args:
        model: In float, before ``attach``.
        batches: Calibration data, each a mapping, tuple, list, tensor or ``Inputs``.
        alpha: Share of the difficulty that moves into the weights, in [0, 1]; None: the authors' for the model's type;
            ``search``: for each producer the one of 0, 0.05, ..., 1 whose block errs least with its readers' weights
            and inputs rounded as ``config`` says.
        config: For ``search``.

    Raises:
        ValueError: alpha outside of [0, 1], or no batch.

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    ICML 2023, arXiv:2211.10438.
    Deviation: layers that are not right after a normalization (value to output, up to down) are smoothed too, where
    running the model proves that nothing changes.  With ``search``, a producer that no alpha helps is left alone.
    """
    if alpha is None:
        alpha = ALPHAS.get(getattr(getattr(model, "config", None), "model_type", ""), 0.5)
    if alpha != SEARCH and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise ValueError(explain("smoothquant.alpha", "a number in [0, 1] or 'search'", repr(alpha), "Use 0.5."))
    if alpha == SEARCH and config is None:
        cure = "Pass config=QuantConfig.parse(...)."
        raise ValueError(explain("smoothquant(alpha='search')", "a config, whose grids are tried", None, cure))
    data = as_batches(batches)
    pairs = find_pairs(model, data[0])
    report = TransformReport(refused=dict(pairs.refused))
    largest = input_absmax(model, data, {path for pair in pairs.found for path in pair.consumers})
    grids = layer_grids(model, config) if alpha == SEARCH and config is not None else {}
    for pair in pairs.found:
        x, w = torch.zeros(pair.channels), torch.zeros(pair.channels)
        for path, index in pair.consumers.items():
            x.scatter_reduce_(0, index, largest[path].cpu().float(), "amax")
            w.scatter_reduce_(0, index, weight_absmax(model.get_submodule(path)), "amax")
        if isinstance(alpha, str):
            trials = [torch.ones(pair.channels), *(smooth_factors(x, w, a / 20) for a in range(21))]
            found = errors(model, pair, trials, grids, inputs=True)
            factors = trials[min(range(len(trials)), key=found.__getitem__)]
            if factors is trials[0]:
                report.refused[pair.producer] = "no alpha lowers the error of its block"
                continue
        else:
            factors = smooth_factors(x, w, alpha)
        rescale(model, pair, factors, "smoothquant", report)
    return report


def weight_absmax(layer: nn.Module) -> Tensor:
    """Largest magnitudes of a layer's weight, per input channel, on the CPU."""
    weight: Any = layer.weight
    w: Tensor = weight.detach().float().abs().cpu()
    groups = int(getattr(layer, "groups", 1))
    if type(layer).__name__ == "Conv1D":
        return w.amax(dim=1)
    if groups > 1:
        return w.view(groups, -1, w.shape[1], w[0, 0].numel()).amax(dim=(1, 3)).flatten()
    return w.transpose(0, 1).flatten(1).amax(dim=1)
