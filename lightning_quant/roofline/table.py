"""The report of a roofline: tables, and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_quant.roofline.predict import Layer, Roofline

PHASES = {"prefill": "Prompt", "decode": "One more token"}
MARKS = {"prefill": "o", "decode": "^"}


def text(found: Roofline) -> str:
    """Memory, then a table for each phase; layers whose paths differ in numbers only are one row."""
    total, load, hardware = found.total, found.load, found.hardware
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in total.parts.items() if size)
    lines = [
        f"{found.model}, {found.scheme or found.dtype}, otherwise {found.dtype}, on {hardware.name}",
        f"{_peaks(found)}; {hardware.source}",
        f"Weights: {_bytes(total.bytes)} ({parts})",
    ]
    if total.cache:
        size = f"{_bytes(total.cache)} at {found.kv_bits} bits, {load.batch} x {load.context + 1} tokens"
        lines.append(f"Keys and values: {size}")
    if hardware.memory is not None and total.bytes + total.cache > hardware.memory:
        lines.append(f"That does not fit into the {_bytes(hardware.memory)} of {hardware.name}.")
    lines += [f"Note: {note}" for note in found.notes]
    for phase, cost in total.phases.items():
        if phase == "decode":
            rate = f"{load.batch / cost.seconds:,.0f} tokens/s"
            amount = f"{load.batch} x 1 token after {load.context}"
        else:
            rate = f"{load.batch * load.prompt / cost.seconds:,.0f} tokens/s"
            amount = f"{load.batch} x {load.prompt} tokens"
        lines += ["", f"{PHASES[phase]} ({amount}): at least {_seconds(cost.seconds)}, {rate} at most"]
        lines += _table([_row(layer, phase) for layer in _shown(found)])
    return "\n".join(lines)


def _shown(found: Roofline) -> list[Layer]:
    """The groups, those without products as one, and the sum."""
    busy = [g for g in found.groups if any(cost.operations for cost in g.phases.values())]
    rest = [g for g in found.groups if g not in busy]
    shown = list(busy)
    if rest:
        from dataclasses import replace

        other = rest[0]
        for group in rest[1:]:
            other = other + group
        shown.append(replace(other, path="(no products)"))
    return [*shown, found.total]


def _row(layer: Layer, phase: str) -> list[str]:
    cost = layer.phases.get(phase)
    own = [layer.path, str(layer.count), ", ".join(layer.arithmetic), _bytes(layer.bytes)]
    if cost is None:
        return [*own, *[""] * 5]
    return [
        *own,
        f"{cost.operations / 1e9:.4g}",
        _bytes(cost.bytes),
        f"{cost.intensity:.3g}",
        _seconds(cost.seconds),
        cost.bound,
    ]


HEADER = ["layers", "", "computes in", "weights", "G operations", "moved", "per byte", "time", "bound by"]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    left = (0, 2, 8)
    return [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in [HEADER, *rows]
    ]


def _bytes(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _peaks(found: Roofline) -> str:
    peaks = ", ".join(f"{name} {peak / 1e12:.4g}" for name, peak in found.hardware.peak.items())
    return f"{peaks} T operations/s; {found.hardware.bandwidth / 1e9:.4g} GB/s"


def draw(found: Roofline, path: str | Path) -> Path:
    """Plot operations per second over operations per byte: the roofs, and every group of layers below them.

    Raises:
        ImportError: matplotlib is missing, with its cure.
    """
    from lightning_quant.plots import figure_of, save

    figure, ((axes,),) = figure_of(1, 1, 8.0, 5.0)
    groups = [g for g in found.groups if any(cost.operations for cost in g.phases.values())]
    points = [cost.intensity for g in groups for cost in g.phases.values() if cost.operations]
    kinds = [kind for g in groups for kind in g.arithmetic]
    ridge = max(found.hardware.peak[kind] for kind in kinds) / found.hardware.bandwidth
    ends = min(points) / 2, max(*points, ridge) * 4
    for kind in dict.fromkeys(kinds):
        _roof(axes, found, kind, ends)
    for i, group in enumerate(groups):
        for phase, cost in group.phases.items():
            if cost.operations:
                size = 5 + 25 * (cost.seconds / found.total.phases[phase].seconds) ** 0.5
                style = {"color": f"C{i % 10}", "fillstyle": "none", "linestyle": "none", "markersize": size}
                axes.plot(cost.intensity, cost.operations / cost.seconds, MARKS[phase], **style)
        axes.plot([], [], "s", color=f"C{i % 10}", label=group.path)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("operations per second, at most")
    marks = "o the prompt, ^ one more token; the larger, the more of its time"
    axes.set_title(f"{found.model}, {found.scheme or found.dtype}, {found.hardware.name}\n{marks}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=6, loc="lower right")
    return save(figure, path)


def _roof(axes: Any, found: Roofline, kind: str, ends: tuple[float, float]) -> None:
    peak, bandwidth = found.hardware.peak[kind], found.hardware.bandwidth
    ridge = peak / bandwidth
    x = [ends[0], ridge, ends[1]]
    axes.plot(x, [min(peak, bandwidth * at) for at in x], color="black", linewidth=1)
    axes.annotate(f"{kind} {peak / 1e12:.3g} T/s", (ends[1], peak), fontsize=7, ha="right", va="bottom")
