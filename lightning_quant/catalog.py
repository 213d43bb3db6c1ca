"""What there is to choose from: the table of methods, one method's formula, and plots of both."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.codebooks import CODEBOOKS
from lightning_quant.errors import explain, unknown
from lightning_quant.estimators import ESTIMATORS, Estimator
from lightning_quant.granularity import Granularity
from lightning_quant.observers import OBSERVERS
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.ranges import RANGES
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scales import SCALE_FORMATS
from lightning_quant.schedule import CURVES, Schedule
from lightning_quant.spec import parse_scheme

ADAM = 4  # value, gradient and two moments
SHAPE = (64, 1024)
TOTAL = 100
BINS = 1.25  # how far plots reach to both sides, in distances of levels: a bin and the start of the next


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: What ``--quant`` takes.
        what: First line of the docstring.
        paper: Authors, year and arXiv number.
        bits: Widths it makes sense for.
        learned: What is trained beside the weights.
        memory: Bytes per weight of what is kept in training for weights, optimizer included.
        state: Names of the tensors kept for weights and for inputs.
        scheme: A scheme it is made for.
    """

    name: str
    what: str
    paper: str
    bits: str
    learned: str
    memory: float
    state: str
    scheme: str


def methods() -> list[Row]:
    """The table of methods, its memory and state read off real quantizers."""
    return [_row(name, kind()) for name, kind in ESTIMATORS.items()]


def _row(name: str, rule: Estimator) -> Row:
    about = rule.about
    weights, inputs = example(rule, True), example(rule, False)
    assert weights is not None
    tensors = dict(weights.named_parameters())
    held = sum(p.numel() * p.element_size() * ADAM for p in tensors.values())
    held += sum(b.numel() * b.element_size() for b in weights.state_dict().values()) - held // ADAM
    kept = [f"w: {', '.join(weights.state_dict())}"] if weights.state_dict() else []
    kept += [f"a: {', '.join(inputs.state_dict())}"] if inputs is not None and inputs.state_dict() else []
    paper = f"{about.paper}, {about.link}" if about.link else about.paper
    memory = held / math.prod(SHAPE)
    return Row(
        name, _first(type(rule)), paper, about.bits, about.learned, memory, "; ".join(kept) or "none", about.scheme
    )


def _first(thing: Any) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(thing) or " ").splitlines()[0]


def example(rule: Estimator, is_weight: bool, shape: tuple[int, ...] = SHAPE) -> FakeQuantizer | None:
    """A quantizer as the method makes it for its own scheme; None if the scheme leaves inputs in float."""
    weight, activation = parse_scheme(rule.about.scheme)
    spec, own = (weight, rule.role(True)) if is_weight else (activation, rule.role(False))
    if spec is None:
        return None
    resolved = (resolve_weight if is_weight else resolve_activation)(spec, shape[0] == 1, own)
    granularity = Granularity(resolved.granularity, 0 if is_weight else None, resolved.group_size or 0)
    if is_weight:
        return FakeQuantizer(resolved, granularity, own, shape=shape)
    return FakeQuantizer(resolved, granularity, own, channels=shape[-1])


def table() -> str:
    """The table as text."""
    rows = [("method", "bits", "learned", "B/weight", "kept", "paper")]
    rows += [(r.name, r.bits, r.learned, f"{r.memory:.3g}", r.state, r.paper) for r in methods()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parts() -> dict[str, dict[str, str]]:
    """What methods are combined with, by the field of ``TensorSpec`` that names it: name -> one line."""
    grids = {"int": "two's complement", "midrise": "two's complement half a step up: no level at 0"}
    grids |= {name: _first(type(book)) for name, book in CODEBOOKS.items()}
    return {
        "observers": {name: _first(kind) for name, kind in OBSERVERS.items()},
        "ranges": {name: _first(kind) for name, kind in RANGES.items()},
        "grids": grids,
        "scale formats": {name: _first(f) if f else "as the weights" for name, f in SCALE_FORMATS.items()},
        "curves of schedules": dict.fromkeys(CURVES, ""),
    }


def describe(name: str) -> str:
    """Formula, settings with defaults, table entry and source of one method.

    Raises:
        ValueError: No such method; the nearest is named.
    """
    rule = _find(name)
    row = _row(name, rule)
    lines = [f"{name}: {row.paper}", f"bits {row.bits}; learned: {row.learned}; made for example for {row.scheme}"]
    lines += [f"kept in training: {row.state}; {row.memory:.3g} bytes per weight, optimizer included", ""]
    kinds = dict.fromkeys([type(rule), type(rule.role(True)), type(rule.role(False))])
    for kind in kinds:
        lines += [inspect.getdoc(kind) or "", ""]
    lines += ["Defaults:"] + [f"  {f.name} = {getattr(rule, f.name)!r}" for f in fields(rule) if f.init]
    return "\n".join(lines if any(f.init for f in fields(rule)) else lines[:-1])


def _find(name: str) -> Estimator:
    if name not in ESTIMATORS:
        raise ValueError(unknown("method", name, ESTIMATORS, "lightning-quant methods"))
    return ESTIMATORS[name]()


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
    rule = _find(name)
    sides = [(side, list(curves(rule, side == "weights"))) for side in ("weights", "inputs")]
    same = type(rule.role(True)) is type(rule.role(False))
    shown = [(side, found) for side, found in sides if found][: 1 if same else 2]
    figure, axes = _figure(2, len(shown))
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
    return _save(figure, path)


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
    figure, axes = _figure(math.ceil(len(CURVES) / columns), columns, 2.4, 1.6)
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
    return _save(figure, path)


def _figure(rows: int, columns: int, width: float = 5.0, height: float = 2.9) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        cure = "pip install 'lightning-quant[report]', or leave the plot out with --no-plot"
        raise ImportError(explain("plots", "the package matplotlib", str(error), cure)) from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix or '.png'}")
    figure.savefig(temporary, dpi=110)
    return temporary.replace(path)
