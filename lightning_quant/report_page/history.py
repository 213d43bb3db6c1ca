"""What a run logged: losses, schedules, and what ``lightning_quant.metrics`` says of the model and of its layers."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.report_page.events import Series, read_events
from lightning_quant.report_page.find import EVENTS, METRICS

PREFIXES = ("quant/", "quant_")  # of QuantCallback, of QuantTrainer
IDLE = ("epoch", "step", "total_flos", "created_at")
TIMING = ("_runtime", "_per_second")


@dataclass
class History:
    """Figures over a run's optimizer steps, each as (step, value).

    Attributes:
        source: The file.
        run: What the run itself logs: losses, learning rates, scores.
        quant: Schedules and means over the model, by the metric's name.
        layers: Metric (``weight_error``, ``input_clip``, ...) -> path of a layer -> its figures.
    """

    source: Path
    run: dict[str, Series] = field(default_factory=dict)
    quant: dict[str, Series] = field(default_factory=dict)
    layers: dict[str, dict[str, Series]] = field(default_factory=dict)

    def last(self, metric: str) -> dict[str, float]:
        """Each layer's last figure of a metric."""
        return {path: series[-1][1] for path, series in self.layers.get(metric, {}).items()}


def read_history(path: Path) -> History:
    """Read ``trainer_state.json``, ``metrics.csv`` or the event files of a directory.

    Raises:
        CheckpointError: The file is damaged.
    """
    if path.is_dir():
        found: dict[str, Series] = {}
        for file in sorted(path.glob(EVENTS)):
            for name, series in read_events(file).items():
                found.setdefault(name, []).extend(series)
    else:
        found = _table(path) if path.name == METRICS else _trainer_state(path)
    return _sorted_out(path, {name: sorted(series, key=lambda p: p[0]) for name, series in found.items()})


def log_rows(path: Path) -> list[dict[str, Any]]:
    """Entries of a ``trainer_state.json``, in order.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8")).get("log_history", [])
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a log_history whose entries are no objects")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        cure = "Take an earlier checkpoint's."
        raise CheckpointError(explain(str(path), "a trainer's state", str(error), cure)) from error
    return list(rows)


def _trainer_state(path: Path) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for row in log_rows(path):
        for name, value in row.items():
            if isinstance(value, (int, float)) and isinstance(row.get("step"), int) and math.isfinite(value):
                found.setdefault(name, []).append((row["step"], float(value)))
    return found


def _table(path: Path) -> dict[str, Series]:
    found: dict[str, Series] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: _number(cell) for name, cell in row.items() if isinstance(name, str)}
            step = numbers.pop("step", None)
            for name, value in numbers.items():
                if value is not None and step is not None:
                    found.setdefault(name, []).append((int(step), value))
    return found


def _number(cell: object) -> float | None:
    try:
        value = float(str(cell))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _sorted_out(source: Path, found: dict[str, Series]) -> History:
    """Tell apart what is the run's, the model's and the layers'."""
    history = History(source)
    ours = {name: name[len(prefix) :] for name in found for prefix in PREFIXES if name.startswith(prefix)}
    # callbacks of several parts log under the part's path; only a whole part has flips without "weight_"
    parts = sorted((inner.removesuffix("/flips") for inner in ours.values() if inner.endswith("/flips")), key=len)
    for name, series in found.items():
        if name not in ours:
            if name not in IDLE and not name.endswith(TIMING):
                history.run[name] = series
            continue
        inner = ours[name]
        part = next((p for p in reversed(parts) if inner.startswith(f"{p}/")), "")
        inner = inner[len(part) + 1 :] if part else inner
        path, _, metric = inner.rpartition("/")
        if path:
            history.layers.setdefault(metric, {})[f"{part}.{path}" if part else path] = series
        else:
            history.quant[f"{part}: {metric}" if part else metric] = series
    return history
