"""Plots of methods and schedules, for the command line and the README."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.catalog import example, find
from lightning_quant.errors import explain
from lightning_quant.estimators import ESTIMATORS, Estimator
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.ste import Ste
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.schedule import CURVES, Schedule

TOTAL = 100
BINS = 1.25  # how far plots reach to both sides, in distances of levels: a bin and the start of the next


@dataclass(frozen=True)
class Curve:
    """One method's functions, sampled: all (n,), real.

    Attributes:
        label: Settings it was drawn with.
        x: Inputs.
        hard: Q(x), what evaluation computes.
        slope: dF/dx, what the backward pass multiplies gradients with.
        soft: F(x), the slope's integral through Q at the middle.
    """

    label: str
    x: Tensor
    hard: Tensor
    slope: Tensor
    soft: Tensor


def curves(rule: Estimator, is_weight: bool, points: int = 1001) -> Iterator[Curve]:
    """The method's functions over two bins, for each of the settings it wants drawn.

    Ranges are those of normally distributed data of variance 1, schedules those in mid-run.
    """
    for settings in rule.drawn:
        quantiles = torch.linspace(-1, 1, 16 * points + 2)[1:-1]
        data = (math.sqrt(2) * torch.erfinv(quantiles)).reshape(1, -1)
        q = example(type(rule)(**settings), is_weight, (1, data.numel()))
        if q is None:
            return
        for name, schedule in q.estimator.schedules().items():
            q._buffers[name].fill_(schedule(TOTAL // 2, TOTAL))  # type: ignore[union-attr]
        q.fit_range(data)
        label = ", ".join(f"{k}={v}" for k, v in settings.items())
        yield _curve(q, data, label, points)


def _curve(q: FakeQuantizer, data: Tensor, label: str, points: int) -> Curve:
    reach = _reach(q, data)
    x = torch.linspace(-reach, reach, points)
    data = data.clone()
    data[0, ::16] = x  # among the data, so that statistics taken at every call stay those of the data
    data.requires_grad_()
    q.train()(data).sum().backward()
    slope = data.grad[0, ::16]  # type: ignore[index]
    hard = q.eval()(data).detach()[0, ::16]
    rise = (x[1:] - x[:-1]) * (slope[1:] + slope[:-1]) / 2
    soft = torch.cat([torch.zeros(1), rise.cumsum(0)])
    middle = points // 2
    return Curve(label, x, hard, slope, soft - soft[middle] + (hard[middle - 1] + hard[middle + 1]) / 2)


def _reach(q: FakeQuantizer, data: Tensor) -> float:
    """Half the width of a plot: a bin and the start of the next, real."""
    levels = q.eval()(data).detach().unique()
    gaps = levels.diff()
    near = int(levels.abs().argmin())
    return BINS * float(gaps[max(near - 1, 0) : near + 1].max()) if len(gaps) else 1.0


def draw(name: str, path: str | Path) -> Path:
    """Plot F, Q and dF/dx of one method over two bins, as PNG (or what the path's suffix says).

    Raises:
        ValueError: No such method.
        ImportError: matplotlib is missing, with its cure.
    """
    rule = find(name)
    sides = [(side, list(curves(rule, side == "weights"))) for side in ("weights", "inputs")]
    same = type(rule.role(True)) is type(rule.role(False))
    shown = [(side, found) for side, found in sides if found][: 1 if same else 2]
    figure, axes = figure_of(2, len(shown))
    for column, (side, found) in enumerate(shown):
        top, bottom = axes[0][column], axes[1][column]
        first = found[0]
        top.step(first.x, first.hard, where="mid", color="black", linewidth=1, label="Q")
        for curve in found:
            top.plot(curve.x, curve.soft, linewidth=1.2, label=f"F {curve.label}".strip())
            bottom.plot(curve.x, curve.slope, linewidth=1.2, label=curve.label or "dF/dx")
        top.set_title(f"{name}, {side}, {rule.about.scheme}", fontsize=10)
        top.set_ylabel("value")
        bottom.set_ylabel("dF/dx")
        bottom.set_xlabel("x")
        bottom.set_ylim(bottom=min(0.0, bottom.get_ylim()[0]))
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    return save(figure, path)


def draw_all(path: str | Path) -> Path:
    """Plot Q and F of every method, one small panel for weights and one for inputs where they are its own."""
    panels = []
    for name, kind in ESTIMATORS.items():
        rule = kind()
        weights, inputs = type(rule.role(True)), type(rule.role(False))
        own = [True] if weights is not Ste or kind is Ste else []
        own += [False] if inputs not in (weights, Ste, Lsq) else []
        for is_weight in own:
            found = list(curves(rule, is_weight))
            panels += [(name if is_weight else f"{name}, inputs", found)] if found else []
    columns = 6
    figure, axes = figure_of(math.ceil(len(panels) / columns), columns, 2.0, 1.6)
    places = [axis for row in axes for axis in row]
    for axis, (title, found) in zip(places, panels, strict=False):
        axis.step(found[0].x, found[0].hard, where="mid", color="black", linewidth=0.8)
        for curve in found:
            axis.plot(curve.x, curve.soft, linewidth=1)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.grid(alpha=0.3)
    for axis in places[len(panels) :]:
        axis.set_visible(False)
    return save(figure, path)


SHOWN: dict[str, dict[str, Any]] = {
    "geometric": {"start": 1e-3, "end": 1.0},
    "hardness": {"start": 0.2, "end": 0.02},
    "adaround": {"start": 20.0, "end": 2.0},
    "piecewise": {"points": ((0.0, 0.0), (0.3, 0.5), (1.0, 1.0))},
    "steps": {"points": ((0.0, 0.5), (0.25, 0.75), (0.5, 0.875), (0.75, 1.0))},
}


def draw_schedules(path: str | Path) -> Path:
    """Plot every curve over a run: from 0 to 1, or between the values it is meant for; dashed: a delay of 0.3."""
    columns = 4
    figure, axes = figure_of(math.ceil(len(CURVES) / columns), columns, 2.4, 1.6)
    panels = [axis for row in axes for axis in row]
    tau = [i / 200 for i in range(201)]
    for axis, name in zip(panels, CURVES, strict=False):
        ends = SHOWN.get(name, {"start": 0.0, "end": 1.0})
        for delay, style in ((0.0, "-"), (0.3, "--")):
            if delay and "points" in ends:
                continue
            schedule = Schedule(name, delay=delay, **ends)
            axis.plot(tau, [schedule(i, 200) for i in range(201)], style, color="tab:blue", linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in panels[len(CURVES) :]:
        axis.set_visible(False)
    figure.supxlabel("share of the run's optimizer steps", fontsize=9)
    return save(figure, path)


def figure_of(rows: int, columns: int, width: float = 5.0, height: float = 2.9) -> tuple[Any, Any]:
    """An empty figure and its axes, (rows, columns); sizes in inches each.

    Raises:
        ImportError: matplotlib is missing, with its cure.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        cure = "pip install 'lightning-quant[report]', or leave the plot out with --no-plot"
        raise ImportError(explain("plots", "the package matplotlib", str(error), cure)) from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix or '.png'}")
    figure.savefig(temporary, dpi=110)
    return temporary.replace(path)
