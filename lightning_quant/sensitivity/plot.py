"""A plot of what layers lose under each scheme, and of the widths that were chosen."""

from __future__ import annotations

from pathlib import Path

from lightning_quant.plots import figure_of, save
from lightning_quant.scheme import parse_scheme
from lightning_quant.sensitivity.result import UNITS, Recipe, Sensitivity

LABELED = 60  # layers whose names still fit below the axis


def draw(found: Sensitivity, path: str | Path, recipe: Recipe | None = None) -> Path:
    """Losses by layer on a logarithmic scale; below them, with a recipe, the width of weights and inputs.

    A loss of 0 or less (the rise of the task's loss may be) has no point.

    Args:
        found: What was measured.
        path: PNG, or what the suffix says.
        recipe: What was chosen.

    Raises:
        ImportError: matplotlib is missing, with its cure.
    """
    places = range(len(found.groups))
    figure, rows = figure_of(1 if recipe is None else 2, 1, max(7.0, min(0.22 * len(places), 24.0)), 3.6)
    top, bottom = rows[0][0], rows[-1][0]
    for scheme, column in zip(found.schemes, zip(*found.losses, strict=True), strict=True):
        top.plot(places, [x if x > 0 else float("nan") for x in column], marker=".", linewidth=1, label=scheme)
    top.set_yscale("log")
    top.set_ylabel(UNITS[found.measure], fontsize=8)
    top.legend(fontsize=7)
    if recipe is not None:
        specs = [parse_scheme(recipe.schemes[group[0]]) for group in found.groups]
        bottom.bar(places, [weight.bits for weight, _ in specs if weight is not None], label="weights")
        if any(inputs is not None for _, inputs in specs):
            widths = [float("nan") if inputs is None else inputs.bits for _, inputs in specs]
            bottom.plot(places, widths, "_", color="black", markersize=10, label="inputs")
        bottom.set_ylabel("bits", fontsize=8)
        bottom.set_title(f"budget: {recipe.budget}", fontsize=8)
        bottom.legend(fontsize=7)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.set_xlim(-0.6, len(places) - 0.4)
        axis.set_xticks(places if len(places) <= LABELED else [])
    if len(places) <= LABELED:
        if recipe is not None:
            top.set_xticklabels([])
        bottom.set_xticklabels([group_name(group) for group in found.groups], rotation=90, fontsize=5)
    bottom.set_xlabel("layers, in order", fontsize=8)
    return save(figure, path)


def group_name(group: tuple[str, ...]) -> str:
    """A group's name: what its paths have in common, and the last word of each."""
    heads = group[0].rpartition(".")[0]
    return f"{heads}.{'|'.join(path.rpartition('.')[2] for path in group)}".lstrip(".")
