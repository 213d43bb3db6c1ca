"""Plots of the overhead benchmarks' results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overhead_scaling import BASE, OURS, TITLES, ratio

from lightning_quant.plots import figure_of, save
from steps.models import title

COLOURS = {"ours": "C0", "torchao": "C1", "modelopt": "C2", "PEFT's": "C3"}


def steps_plot(results: dict[str, Any], folder: Path) -> Path:
    """Bars of all candidates' time and memory over their baseline's, a row of axes for each model."""
    parts = [part["steps"] for part in results["models"].values() if "steps" in part]
    if not parts:
        raise SystemExit("--plots: expected results, got none. Measure first.")
    most = max(len(part["candidates"]) for part in parts)
    figure, axes = figure_of(len(parts), 2, 6.5, 1.0 + 0.16 * most)
    for row, part in zip(axes, parts, strict=True):
        found = part["candidates"]
        names = [n for n, c in found.items() if c.get("baseline", "plain") != n and n != "plain"][::-1]
        bases = [found[found[n].get("baseline", "plain")] for n in names]
        colours = [COLOURS[n.split()[0]] for n in names]
        row[0].barh(names, [found[n]["ratio"] - 1 for n in names], color=colours)
        ends = [(found[n]["ratio_10"] - 1, found[n]["ratio_90"] - 1) for n in names]
        row[0].hlines(names, [low for low, _ in ends], [high for _, high in ends], color="black", linewidth=0.8)
        row[0].set_title(f"{title(part['settings'])})", fontsize=8)
        row[0].set_xlabel("time over the baseline's, less 1 (10 to 90 % of rounds)", fontsize=7)
        more = [
            found[n]["peak"] / b["peak"] - 1 if "peak" in found[n] else 0.0 for n, b in zip(names, bases, strict=True)
        ]
        row[1].barh(names, more, color=colours)
        row[1].set_xlabel("peak memory over the baseline's, less 1", fontsize=7)
        for one in row:
            one.tick_params(labelsize=6)
            one.axvline(0, color="black", linewidth=0.8)
    folder.mkdir(parents=True, exist_ok=True)
    return save(figure, folder / "overhead.png")


def scaling_plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Measured and predicted overhead over hidden size, tokens and layers: a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    base = results["points"][0]["point"]
    files = []
    for varied in BASE:
        rest = [name for name in BASE if name != varied]
        rows = [row for row in results["points"] if all(row["point"][name] == base[name] for name in rest)]
        rows.sort(key=lambda row: row["point"][varied])
        figure, ((axes,),) = figure_of(1, 1, 6.0, 4.0)
        for i, name in enumerate(OURS):
            mine = [row for row in rows if name in row["measured"]]
            x = [row["point"][varied] for row in mine]
            axes.plot(x, [row["measured"][name]["ratio"] for row in mine], f"C{i}o-", label=name.removeprefix("ours "))
            ends = [[row["measured"][name][key] for row in mine] for key in ("ratio_10", "ratio_90")]
            axes.fill_between(x, *ends, color=f"C{i}", alpha=0.12, linewidth=0)
            axes.plot(x, [ratio(row["predicted"], name) for row in mine], f"C{i}--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x := [row["point"][varied] for row in rows], [str(value) for value in x])
        axes.set_xlabel(TITLES[varied])
        axes.set_ylabel("step time over plain's")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        others = ", ".join(f"{TITLES[name]} {base[name]}" for name in rest)
        axes.set_title(f"{others}; dashed: predicted; shaded: 10 to 90 % of rounds", fontsize=8)
        axes.legend(fontsize=7)
        files.append(save(figure, folder / f"overhead_{varied}.png"))
    return files
