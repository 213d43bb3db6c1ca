"""The plots of a page, each a function that draws into a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from lightning_quant.report_page.events import Series
from lightning_quant.report_page.layers import Histogram, LayerFigures, decibels
from lightning_quant.report_page.svg import label, panels, save
from lightning_quant.sensitivity.plot import group_name
from lightning_quant.sensitivity.result import UNITS, Sensitivity

BLUE, ORANGE, GRAY = "#4c8bf5", "#e0662d", "#9a9a9a"
LINES = ("#e0662d", "#4c8bf5", "#2ca25f", "#a05eb5", "#c2a000", "#d6478b")
BARS = 30  # layers in a plot of bars
POINTS = 400  # of a curve
THIN = 200  # curves without a name


def errors(layers: Sequence[LayerFigures], path: Path) -> None:
    """Error of each layer's weight, in percent of the weight, the worst on top."""
    shown = [f for f in layers if f.error is not None][:BARS]
    figure, (axis,) = panels(1, 1, 8.5, 0.7 + 0.2 * len(shown))
    values = [100 * math.sqrt(f.error or 0.0) for f in shown]
    colors = [ORANGE, *[BLUE] * (len(shown) - 1)]
    axis.barh(range(len(shown)), values, color=colors, height=0.7)
    axis.set_yticks(range(len(shown)), [label(f.name) for f in shown], fontsize=7)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel("size of the rounding error, % of the weight's own size")
    axis.grid(visible=False, axis="y")
    save(figure, path)


def histograms(layers: Sequence[tuple[str, Histogram]], path: Path) -> None:
    """Weights before and after rounding, on a common axis of grid steps."""
    figure, axes = panels(len(layers), 2, 4.3, 2.1)
    for axis, (name, found) in zip(axes, layers, strict=True):
        places = [found.low + found.width * i for i in range(len(found.before) + 1)]
        gap = min(b - a for a, b in zip(found.levels, found.levels[1:], strict=False))
        bars = axis.bar(found.levels, [100 * s for s in found.after], 0.8 * gap, color=ORANGE, alpha=0.75)
        # as many values in a bin as would be on a level if it were as wide as the grid's steps
        dense = [100 * s * gap / found.width for s in found.before]
        (line,) = axis.step(places, [*dense, dense[-1]], where="post", color=BLUE, linewidth=0.9)
        axis.set_title(label(name, 60), fontsize=7, loc="left")
        axis.set_ylabel("% per step", fontsize=7)
        axis.set_xlabel("weight in steps of the grid", fontsize=7)
    figure.legend([line, bars], ["before (float)", "after (on the grid)"], loc="outside upper right", ncols=2)
    save(figure, path)


def curves(series: Mapping[str, Series], path: Path) -> None:
    """One small panel for each figure over the optimizer steps."""
    figure, axes = panels(len(series), 3, 3.0, 1.7)
    for axis, (name, points) in zip(axes, series.items(), strict=True):
        axis.plot(*_thinned(points), color=BLUE, linewidth=1.1, **_marks(points))
        axis.set_title(label(name), fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
    figure.supxlabel("optimizer step", fontsize=8)
    save(figure, path)


def layer_curves(metrics: Mapping[str, Mapping[str, Series]], worst: Sequence[str], path: Path) -> None:
    """Panels of every layer's figures over the steps; the worst ones in color.

    Args:
        metrics: Title of a panel -> layer -> figures.
        worst: Layers with a color.
        path: Where to.
    """
    figure, axes = panels(len(metrics), 2, 4.3, 2.4)
    colors = dict(zip(worst, LINES, strict=False))
    lines = {}
    for axis, (title, layers) in zip(axes, metrics.items(), strict=True):
        others = [name for name in layers if name not in colors]
        for name in others[:: -(-len(others) // THIN) or 1]:
            axis.plot(*_thinned(layers[name]), color=GRAY, linewidth=0.5, alpha=0.5)
        for name, color in colors.items():
            if name in layers:
                points = layers[name]
                (lines[name],) = axis.plot(*_thinned(points), color=color, linewidth=1.3, **_marks(points))
        axis.set_title(title, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.set_xlabel("optimizer step", fontsize=7)
    figure.legend(lines.values(), map(label, lines), loc="outside lower center", ncols=2, fontsize=7)
    save(figure, path)


def sensitivity(found: Sensitivity, path: Path) -> None:
    """What each group of layers costs under each scheme, the most sensitive on top; no loss has no point."""
    order = sorted(range(len(found.groups)), key=lambda i: -max(found.losses[i]))[:BARS]
    figure, (axis,) = panels(1, 1, 8.5, 0.9 + 0.2 * len(order))
    for column, (scheme, color) in enumerate(zip(found.schemes, cycle(LINES), strict=False)):
        values = [found.losses[i][column] for i in order]
        shown = [x if x > 0 else math.nan for x in values]
        axis.plot(shown, range(len(order)), "o", color=color, markersize=4, label=label(scheme))
    if any(x > 0 for i in order for x in found.losses[i]):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    axis.set_yticks(range(len(order)), [label(group_name(found.groups[i])) for i in order], fontsize=7)
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.set_xlabel(UNITS[found.measure])
    figure.legend(loc="outside upper right", ncols=len(found.schemes))
    save(figure, path)


def scores(values: Mapping[str, float], figure_name: str, path: Path) -> None:
    """A point for each run: bars would have to begin at 0, where differences do not show."""
    figure, (axis,) = panels(1, 1, 8.5, 0.7 + 0.26 * len(values))
    places = range(len(values))
    axis.plot(list(values.values()), places, "o", color=BLUE, markersize=6)
    axis.set_yticks(places, [label(name) for name in values], fontsize=8)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlabel(label(figure_name))
    save(figure, path)


def to_decibels(layers: Mapping[str, Series]) -> dict[str, Series]:
    """Errors as signal over noise in dB; where there is no noise there is no point."""
    return {n: [(step, decibels(v)) for step, v in s if v > 0] for n, s in layers.items()}


def _thinned(points: Series) -> tuple[list[int], list[float]]:
    kept = points[:: -(-len(points) // POINTS) or 1]
    kept = kept if not points or kept[-1] is points[-1] else [*kept, points[-1]]
    return [step for step, _ in kept], [value for _, value in kept]


def _marks(points: Series) -> dict[str, str | float]:
    """A line of few points shows them."""
    return {"marker": ".", "markersize": 4.0} if len(points) < 12 else {}
