"""Pictures of the accuracy ladder: figures against bits, losses against steps, and what PEGE schedules and learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ladder.methods import LADDER, METHODS
from ladder.plan import CONTROL, ladder
from ladder.store import FLOAT, Store
from ladder.tasks import TASKS

SHOWN = ("ste", "pege", "lsq", "ewgs", "dsq", "pege_replace", "dampen")
WIDTHS = ("w1", "w1.58", "w2", "w3", "w4")
PANELS = {"theta": "mean Theta", "theta_max": "largest Theta", "lam": "lambda"}


def draw(results: dict[str, Any], store: Store, folder: Path) -> list[Path]:
    """Write one picture per task and kind.

    Args:
        results: What ``accuracy.json`` holds.
        store: The runs, which have the curves.
        folder: Where pictures go.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task in dict.fromkeys(c["task"] for c in results["cells"] if c["part"] == "ladder"):
        own = [c for c in results["cells"] if c["task"] == task and c["optimizer"] == "adamw" and c["part"] == "ladder"]
        for name, figure in (
            ("bits", against_bits(task, own)),
            ("steps", over_steps(task, store, {"loss": "training loss"}, SHOWN)),
            ("theta", over_steps(task, store, PANELS, [label for label in METHODS if METHODS[label].method == "pege"])),
        ):
            if figure is not None:
                files.append(folder / f"{task}-{name}.png")
                figure.savefig(files[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
    return files


def against_bits(task: str, cells: list[dict[str, Any]]) -> Any:
    """What counts on the task against the weights' width, with standard deviations over seeds."""
    counts, (figure, axes) = TASKS[task].counts, panels(1)
    axis = axes[0]
    for label in SHOWN:
        known = {c["scheme"]: c for c in cells if c["label"] == label and c[counts] is not None}
        widths = [w for w in WIDTHS if w in known]
        spread = [known[w][f"{counts}_deviation"] or 0.0 for w in widths]
        if widths:
            places = [WIDTHS.index(w) for w in widths]
            axis.errorbar(places, [known[w][counts] for w in widths], spread, label=label, capsize=2, marker="o")
    if not axis.lines:
        return None
    for c in cells:
        if c["scheme"] == FLOAT and c["label"] == CONTROL:
            axis.axhline(c[counts], color="black", linestyle=":", label=CONTROL)
    axis.set_xticks(range(len(WIDTHS)), WIDTHS)
    axis.set(xlabel="weights", ylabel=f"test {counts}", title=task)
    axis.legend(fontsize=7)
    return figure


def over_steps(task: str, store: Store, names: dict[str, str], labels: Any) -> Any:
    """Curves of the first seed at the chosen rates, at the ladder's first scheme of the task."""
    scheme = LADDER[task]["adamw"][0]
    figure, axes = panels(len(names))
    for cell in ladder([task], [scheme], list(labels), ["adamw"]):
        missing, best = cell.sweep(store)
        row = None if missing or best is None else store.get(cell.job(best, cell.seeds(1)[0]))
        curves = (row or {}).get("curves", {})
        for axis, name in zip(axes, names, strict=True):
            if cell.label in labels and name in curves:
                axis.plot(curves["step"], curves[name], label=cell.label)
    for axis, title in zip(axes, names.values(), strict=True):
        axis.set(xlabel="step", title=f"{task} {scheme}: {title}")
        if axis.lines:
            axis.legend(fontsize=7)
    if "loss" in names:
        axes[0].set_yscale("log")
    return figure if any(axis.lines for axis in axes) else None


def panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many axes beside one another, which no window manager knows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 4))
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
