"""Evaluation figures of runs, to set beside each other: only those that were written down somewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.card import TRAINER_STATE
from lightning_quant.report_page.find import newest_checkpoint
from lightning_quant.report_page.history import TIMING, History, log_rows

RESULTS = ("eval_results.json", "all_results.json")
HELD_OUT = ("eval", "val", "test")
Table = dict[str, dict[str, float]]  # figure -> run -> value


def compared(runs: Iterable[tuple[str, Path]]) -> Table:
    """Figures of several runs, by the figure's name and the run's.

    Args:
        runs: Name of each, and its directory, or a JSON file of figures: ``{run: value}``, or such objects by name;
            objects that hold anything else than numbers are passed over.

    Raises:
        CheckpointError: No figures are there.
    """
    table: Table = {}
    for name, path in runs:
        found = _of_json(name, path) if path.is_file() else {k: {name: v} for k, v in directory_scores(path).items()}
        if not found:
            expected = f"evaluation figures ({', '.join(RESULTS)} or eval_* in {TRAINER_STATE})"
            cure = "Evaluate it, or leave it out."
            raise CheckpointError(explain(f"--compare {path}", expected, "none", cure))
        for figure, values in found.items():
            table.setdefault(figure, {}).update(values)
    return table


def directory_scores(directory: Path) -> dict[str, float]:
    """What the last evaluation in a training directory gave: from its results file, else from the trainer's state."""
    for name in RESULTS:
        if (directory / name).is_file():
            scores = _scores(_json(directory / name))
            if scores:
                return scores
    state = newest_checkpoint(directory, TRAINER_STATE)
    rows = [] if state is None else [row for row in map(_scores, log_rows(state / TRAINER_STATE)) if row]
    return rows[-1] if rows else {}


def logged_scores(history: History) -> dict[str, float]:
    """The last held-out figures of a log: names with ``val``, ``test`` or ``eval`` before them."""
    return {name: series[-1][1] for name, series in history.run.items() if name.startswith(HELD_OUT)}


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    held = {k: _number(v) for k, v in row.items() if k.startswith("eval_") and not k.endswith(TIMING)}
    return {k: v for k, v in held.items() if v is not None and k not in ("eval_samples", "eval_model_preparation_time")}


def _number(value: object) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None  # type: ignore[arg-type]


def _of_json(name: str, path: Path) -> Table:
    data = _json(path)
    groups = {k: v for k, v in data.items() if isinstance(v, dict)} or {name: data}
    rows = {figure: {run: _number(v) for run, v in values.items()} for figure, values in groups.items()}
    return {
        f: {k: v for k, v in row.items() if v is not None}
        for f, row in rows.items()
        if row and None not in row.values()
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"a {type(data).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        cure = "Leave it out, or evaluate again."
        raise CheckpointError(explain(str(path), "a JSON object of figures", str(error), cure)) from error
    return data
