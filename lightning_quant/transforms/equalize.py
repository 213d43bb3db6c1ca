"""Cross-layer equalization: layers one after the other share the ranges of the channels between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.bypass import evaluating
from lightning_quant.errors import explain
from lightning_quant.transforms.pairs import Pair, as_batches, call, find_pairs, is_consumer, whole
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import Applied, TransformReport, difference, rescale
from lightning_quant.transforms.smoothquant import weight_absmax

SETTLED, ROUNDS = 1e-3, 20
SMALLEST = 1e-8


def equalizing_factors(first: Tensor, second: Tensor) -> Tensor:
    """``sqrt(r1 / r2)``: dividing the first layer and multiplying the second gives both ``sqrt(r1 r2)``.

    A channel without weights on one side keeps a factor of 1.

    >>> equalizing_factors(torch.tensor([8.0, 0.5]), torch.tensor([0.5, 2.0]))
    tensor([4.0000, 0.5000])
    """
    factors = (first / second.clamp(min=SMALLEST)).sqrt()
    return torch.where((first > SMALLEST) & (second > SMALLEST), factors, torch.ones_like(factors))


@computed_in_float32
@torch.no_grad()
def equalize(model: nn.Module, batches: Iterable[Any], relu6: bool = False) -> TransformReport:
    """Balance the weights of neighbouring layers, in place, until ranges settle.

    Between two layers may lie what passes a factor per channel on: ReLU, a gate's product, attention's mean, or batch
    normalization, whose own parameters then carry the first layer's factor.

    Args:
        model: In float, before ``attach``.
        batches: Data, of which the first is used, to find and check the pairs with.
        relu6: Replace ReLU6 by ReLU first, without which channels between may not be scaled.  That changes the function
            where activations exceed 6, and the report counts it.

    Raises:
        ValueError: No batch, or ``relu6`` for a model of transformers, whose config says which activation it has.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
    arXiv:1906.04721.
    """
    batch = as_batches(batches)[0]
    replaced = Applied("ReLU6", (), "relu6 -> relu", 0.0)
    if relu6:
        start = whole(model, batch)[1]()
        count = without_relu6(model)
        moved = difference(start, whole(model, batch)[1]()) if count else 0.0
        replaced = Applied(f"{count} ReLU6", (), "relu6 -> relu", moved)
    before = layers_before_norms(model, batch)
    pairs = find_pairs(model, batch)
    report = TransformReport(refused=dict(pairs.refused))
    open_pairs = [p for p in pairs.found if _range(model, p.producer, before) is not None]
    alone = {p.producer for p in pairs.found} - {p.producer for p in open_pairs}
    report.refused |= dict.fromkeys(sorted(alone), "a normalization without a layer right before it has no weights")
    for _ in range(ROUNDS):
        moved = 0.0
        for pair in list(open_pairs):
            first = _range(model, pair.producer, before)
            assert first is not None
            factors = equalizing_factors(first, _range_of_readers(model, pair))
            step = float(factors.log().abs().max())
            if step <= SETTLED:
                continue
            if not rescale(model, pair, factors, "equalize", report):
                open_pairs.remove(pair)
                continue
            moved = max(moved, step)
        if moved <= SETTLED:
            break
    report = _merged(report)
    report.applied += [replaced] if relu6 else []
    return report


def without_relu6(model: nn.Module) -> int:
    """Replace every ``nn.ReLU6`` by ``nn.ReLU``, in place; returns how many there were.

    Raises:
        ValueError: A model of transformers has some: saved, it would come back with ReLU6.
    """
    found = [(m, name, child) for m in model.modules() for name, child in m._modules.items() if type(child) is nn.ReLU6]
    if found and hasattr(model, "config") and hasattr(model, "save_pretrained"):
        got, cure = "ReLU6, which its config names", "Set hidden_act='relu' in the config it is loaded with."
        raise ValueError(explain("equalize(relu6=True)", "a model whose modules say all", got, cure))
    for module, name, child in found:
        setattr(module, name, nn.ReLU(inplace=child.inplace))
    return len(found)


@torch.no_grad()
def layers_before_norms(model: nn.Module, batch: Any) -> dict[str, str]:
    """Path of a batch normalization -> path of the layer whose output it reads, unchanged, in a run of the model."""
    made: dict[int, tuple[Tensor, int, str]] = {}  # by identity; the tensors are held, so that none is reused
    found: dict[str, str | None] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            made[id(y)] = y, y._version, path

        return hook

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            y, version, layer = made.get(id(args[0]), (None, -1, ""))
            before = layer if y is not None and y._version == version else None
            found[path] = before if found.setdefault(path, before) == before else None

        return hook

    handles = []
    for path, module in model.named_modules():
        if is_consumer(module):
            handles.append(module.register_forward_hook(note(path)))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            handles.append(module.register_forward_pre_hook(look(path)))
    try:
        with evaluating(model):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {norm: layer for norm, layer in found.items() if layer is not None}


def _range(model: nn.Module, path: str, before: dict[str, str]) -> Tensor | None:
    """Largest magnitudes of the weights that make a producer's channels; None for a normalization by itself."""
    module: Any = model.get_submodule(path)
    if is_consumer(module):
        return _rows(module)
    if path not in before:
        return None
    gain: Tensor = module.weight.float() / (module.running_var.float() + module.eps).sqrt()
    return _rows(model.get_submodule(before[path])) * gain.abs().cpu()


def _rows(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    w: Tensor = weight.detach().float().abs().cpu()
    return w.amax(dim=0) if type(layer).__name__ == "Conv1D" else w.flatten(1).amax(dim=1)


def _range_of_readers(model: nn.Module, pair: Pair) -> Tensor:
    second = torch.zeros(pair.channels)
    for path, index in pair.consumers.items():
        second.scatter_reduce_(0, index, weight_absmax(model.get_submodule(path)), "amax")
    return second


def _merged(report: TransformReport) -> TransformReport:
    """One entry per site, with its largest difference."""
    sites: dict[str, Applied] = {}
    for a in report.applied:
        if a.producer not in sites or sites[a.producer].difference < a.difference:
            sites[a.producer] = a
    return TransformReport(list(sites.values()), report.refused)


__all__ = ["equalize", "equalizing_factors"]
