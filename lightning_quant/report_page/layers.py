"""What rounding does to each layer's weight: one weight in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError
from lightning_quant.estimators import overrides
from lightning_quant.export.layout import on_disk
from lightning_quant.export.weights import float_tensors, item_count
from lightning_quant.export.writer import as_shipped, shipped_model
from lightning_quant.layers import QuantLayer
from lightning_quant.metrics import clipped
from lightning_quant.plan import words
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.report_page.history import History
from lightning_quant.report_page.sizes import of_layers, stored_tensors
from lightning_quant.runtime.checkpoint import Checkpoint
from lightning_quant.sensitivity.budgets import stored_bits

AT_ONCE = 2**22  # values that temporaries are made of
FINE, FEW = 16, 8  # levels, up to which a histogram has several bins for each, and many
MOST = 512  # bins


@dataclass(frozen=True)
class Histogram:
    """A weight before and after rounding, in units of its scales (zero points added), one axis for all groups.

    Attributes:
        low: Left end of the first bin.
        width: Of a bin.
        before: Share of the float values in each bin; what lies further out is in none.
        levels: Places of the grid's levels.
        after: Share of the values on each level.
    """

    low: float
    width: float
    before: list[float]
    levels: list[float]
    after: list[float]


@dataclass(frozen=True)
class LayerFigures:
    """One layer; None where a figure cannot be had.

    Attributes:
        name: Its path.
        scheme: Its grid in words.
        numbers: Values in its weight.
        float_bytes: Bytes of the weight in training.
        stored: Bytes as stored, scales included.
        error: ``||w - q||^2 / ||w||^2``, as ``lightning_quant.metrics`` has it.
        clip: Share of values at least half a step outside the outermost levels.
        used: Share of the grid's codes that at least one value has.
        histogram: The weight on its grid.
        logged: Whether ``error`` and ``clip`` are the last ones logged, rather than measured here.
    """

    name: str
    scheme: str = ""
    numbers: int | None = None
    float_bytes: int | None = None
    stored: int | None = None
    error: float | None = None
    clip: float | None = None
    used: float | None = None
    histogram: Histogram | None = None
    logged: bool = False

    @property
    def snr(self) -> float | None:
        """Signal over noise of the rounded weight, in dB; infinite where rounding changes nothing."""
        return None if self.error is None else decibels(self.error)

    @property
    def bits(self) -> float | None:
        """Stored bits per value."""
        return 8 * self.stored / self.numbers if self.stored is not None and self.numbers else None


@dataclass(frozen=True)
class Measured:
    """The layers of a model, and its size.

    Attributes:
        layers: Quantized layers, the one with the largest error first.
        before: Bytes of all weights in training.
        after: The same with quantized layers as densely packed codes and scales.
        exact: Whether every layer's bytes are those of its export, found there under its name.
    """

    layers: list[LayerFigures]
    before: int
    after: int
    exact: bool


def decibels(error: float) -> float:
    """Noise over signal as signal over noise in dB.

    >>> decibels(0.01)
    20.0
    """
    return -10 * math.log10(error) if error > 0 else math.inf


@torch.no_grad()
def measure_model(model: nn.Module, export: Path | None = None) -> Measured:
    """Measure every quantized weight, one at a time.

    Args:
        model: With quantizers; its weights may be on disk.
        export: Where it was exported to, for the bytes of each layer.
    """
    model = shipped_model(model)
    stored = {} if export is None else stored_tensors(export)
    found, before, after, exact = [], 0, 0, True
    with as_shipped(model):
        for name, tensor, layer in track(float_tensors(model), "measuring layers", item_count(model)):
            size = tensor.numel() * tensor.element_size()
            before += size
            if layer is None:
                after += size
                continue
            figures = _measure(name.removesuffix(".weight"), layer, size)
            after += figures.stored or 0
            paths = [key.removesuffix(".weight") for key in on_disk(model, name, tensor)]
            exported = sum(of_layers(stored, paths).values())
            exact &= exported > 0
            found.append(replace(figures, stored=exported) if exported else figures)
    return Measured(worst_first(found), before, after, exact)


def worst_first(layers: Sequence[LayerFigures]) -> list[LayerFigures]:
    """By falling error, else by falling size."""
    return sorted(layers, key=lambda f: (-math.inf if f.error is None else -f.error, -(f.stored or 0)))


def _measure(name: str, layer: QuantLayer, size: int) -> LayerFigures:
    q, weight = layer.weight_quant, layer.folded()[0].detach()
    codes, grid, total = q.stored(weight)[0], q.grid, max(weight.numel(), 1)
    counts = torch.zeros(grid.high - grid.low + 1)
    for part in _pieces(codes):
        counts += torch.bincount(part.long() - grid.low, minlength=len(counts))
    given = q.estimator.transform(q, weight)
    noise = signal = 0.0
    for a, b in zip(_pieces(given), _pieces(q.on_grid(weight)), strict=True):
        noise += float((a.double() - b.double()).square().sum())
        signal += float(a.double().square().sum())
    levels = [float(n) for n in grid.levels or range(grid.low, grid.high + 1)]
    axis = _axis(levels)
    outside, bins = _places(q, given, axis)
    histogram = None
    if not overrides(q.estimator, "decode"):  # else levels are elsewhere for each layer
        low, high, count = axis
        shares = ((part / total).tolist() for part in (bins, counts))
        histogram = Histogram(low, (high - low) / count, next(shares), levels, next(shares))
    return LayerFigures(
        name,
        words(q.spec, None if layer.input_quant is None else layer.input_quant.spec),
        weight.numel(),
        size,
        math.ceil(stored_bits(layer) / 8),
        noise / max(signal, 1e-30),
        outside / total,
        int((counts > 0).sum()) / len(counts),
        histogram,
    )


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.flatten(), AT_ONCE)


def _axis(levels: list[float]) -> tuple[float, float, int]:
    """Ends and number of bins: one step further than the levels on both sides, each level in the middle of a bin."""
    first, last = levels[1] - levels[0], levels[-1] - levels[-2]
    low, high = levels[0] - 1.5 * first, levels[-1] + 1.5 * last
    if len(levels) > FINE:
        return low, high, len(levels) + 2
    return low, high, min((9 if len(levels) <= FEW else 5) * round((high - low) / min(first, last)), MOST)


def _places(q: FakeQuantizer, x: Tensor, axis: tuple[float, float, int]) -> tuple[float, Tensor]:
    """How many values are clipped, and how many lie in each bin of a histogram, in units of the scales."""
    view, scale, zero, _ = q.blocks(x)
    low, high, count = axis
    bins, outside = torch.zeros(count), 0.0
    step = max(AT_ONCE // max(view[:1].numel(), 1), 1)
    for start in range(0, len(view), step):
        rows = slice(start, start + step)
        part = view[rows].float()
        own, middle = (t[rows] if isinstance(t, Tensor) and len(t) == len(view) else t for t in (scale, zero))
        if q.clips:
            outside += float(clipped(part, own, middle, q.grid)) * part.numel()  # type: ignore[arg-type]
        bins += torch.histc(part / own + middle, count, low, high)
    return outside, bins


def exported_layers(export: Path) -> list[LayerFigures]:
    """What an export alone tells: bytes of each layer, and where its integers can be read, the codes they use."""
    tensors = stored_tensors(export)
    owners = {name.rpartition(".")[0] or name for name, (_, shape) in tensors.items() if len(shape) > 1}
    sizes, reader = of_layers(tensors, owners), _reader(export)
    return worst_first([_exported(name, size, reader) for name, size in track(sizes.items(), "reading layers")])


def _reader(export: Path) -> Checkpoint | None:
    try:
        return Checkpoint(export)
    except (CheckpointError, ValueError):  # of another format
        return None


def _exported(name: str, size: int, reader: Checkpoint | None) -> LayerFigures:
    if reader is None or not reader.parts(name):
        return LayerFigures(name, stored=size)
    held = reader.stored(name)
    scheme = f"w{held.bits} in {held.scale.shape[1]} groups per row" if held.scale.shape[1] > 1 else f"w{held.bits}"
    return LayerFigures(
        name, scheme, held.codes.numel(), stored=size, used=torch.unique(held.codes).numel() / 2**held.bits
    )


def with_logged(layers: Sequence[LayerFigures], history: History | None) -> list[LayerFigures]:
    """Fill in what was not measured with the last figures that the run logged of its layers."""
    errors, clips = ({}, {}) if history is None else (history.last("weight_error"), history.last("weight_clip"))
    known = {figures.name for figures in layers}
    rows = [*layers, *(LayerFigures(path) for path in errors if path not in known)]
    return worst_first(
        [
            f
            if f.error is not None or f.name not in errors
            else replace(f, error=errors[f.name], clip=clips.get(f.name), logged=True)
            for f in rows
        ]
    )
