"""From finished runs to the leaderboard's figures: means, paired differences, what was recovered."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from ladder.methods import ROUNDED, ROUNDED_SCHEMES, SWEEP_SEED
from ladder.plan import CONTROL, ORIGINAL, Cell
from ladder.stats import paired
from ladder.store import FLOAT, Store, rounded
from ladder.tasks import RATES, TASKS

Rows = dict[str, dict[str, Any]]  # finished runs by seed and float checkpoint
BASE, DEFAULT = "ste", "pege"  # what everything is compared with; what the front ends take if nothing is said
NEAR_ZERO = 1e-9


def rows_of(cell: Cell, store: Store, seeds: int) -> Rows:
    """Finished runs at the chosen rate, by seed and float checkpoint: only what shares both is paired."""
    missing, best = cell.sweep(store)
    if missing or best is None:
        return {}
    found = [store.get(cell.job(best, seed)) for seed in cell.seeds(seeds)]
    return {f"{row['seed']}-{row['born']}": row for row in found if row is not None}


def figure(row: dict[str, Any], name: str) -> float:
    """A figure; a loss that diverged is infinite."""
    return math.inf if row[name] is None else float(row[name])


def summary(cells: Iterable[Cell], store: Store, seeds: int) -> list[dict[str, Any]]:
    """Figures of every cell with at least one finished seed."""
    found = [(cell, rows) for cell in cells if (rows := rows_of(cell, store, seeds))]
    bases = {(cell.label, place(cell)): rows for cell, rows in found if cell.label in (BASE, DEFAULT)}
    return [entry(cell, rows, bases, store) for cell, rows in found]


def place(cell: Cell) -> tuple[Any, ...]:
    """What cells that are compared have in common."""
    return cell.part, cell.budget, cell.task, cell.optimizer, cell.scheme


def entry(cell: Cell, rows: Rows, bases: dict[tuple[str, Any], Rows], store: Store) -> dict[str, Any]:
    """One cell's figures, ``bases`` by label and place."""
    counts, base = TASKS[cell.task].counts, bases.get((BASE, place(cell)))
    out: dict[str, Any] = {name: getattr(cell, name) for name in ("part", "task", "optimizer", "scheme", "label")}
    out |= {"method": cell.method, "options": dict(cell.options), "steps": cell.steps, "n": len(rows)}
    if cell.budget is not None:
        out["budget"] = cell.budget
    if cell.steps:
        out["lr"] = next(iter(rows.values()))["lr"]
        out["edge"] = at_edge(cell, out["lr"], store)
    for name in ("accuracy", "loss"):
        values = [figure(row, f"test_{name}") for row in rows.values()]
        out[name] = statistics.mean(values)
        finite = len(values) > 1 and all(map(math.isfinite, values))
        out[f"{name}_deviation"] = statistics.stdev(values) if finite else None
    if base is not None and cell.label != BASE:
        for name in ("accuracy", "loss"):
            pair = paired(column(rows, name), column(base, name), more_is_better=name == "accuracy")
            if pair is not None:
                out["against_ste" if name == counts else f"against_ste_{name}"] = pair._asdict()
        out["seconds"] = least(rows, "step") / least(base, "step") if cell.steps else None
    default = bases.get((DEFAULT, place(cell)))
    if default is not None and cell.label != DEFAULT:
        pair = paired(column(rows, counts), column(default, counts), more_is_better=counts == "accuracy")
        if pair is not None:
            out["against_default"] = pair._asdict()
    if "bytes" in next(iter(rows.values())):
        out["bytes"] = next(iter(rows.values()))["bytes"]
    return rounded(out)


def at_edge(cell: Cell, lr: float, store: Store) -> bool:
    """Whether the rate is the smallest or largest that was tried, so that a better one may lie beyond."""
    tried = [rate for rate in RATES if store.get(cell.job(rate, SWEEP_SEED)) is not None]
    return bool(tried) and lr in (min(tried), max(tried))


def column(rows: Rows, name: str) -> dict[Any, float]:
    return {key: figure(row, f"test_{name}") for key, row in rows.items()}


def least(rows: Rows, name: str) -> float:
    """Of times the smallest: what else runs on a machine only adds to them."""
    return min(row[name] for row in rows.values())


def verdict(cell: dict[str, Any], against: str = "against_ste") -> int:
    """1, -1 or 0: better or worse than STE (or the default) by more than the 95 % interval, or neither."""
    pair = cell.get(against)
    if not pair or pair["interval"] is None or pair["difference"] is None or abs(pair["difference"]) < NEAR_ZERO:
        return 0
    if abs(pair["difference"]) <= pair["interval"]:
        return 0
    more = TASKS[cell["task"]].counts == "accuracy"
    return 1 if (pair["difference"] > 0) == more else -1


def recovered(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the gap between the best post-training method and the better float model, the share each method closes."""
    out = []
    tasks = dict.fromkeys(c["task"] for c in cells if TASKS[c["task"]].kind == "language")
    for task in tasks:
        own = [c for c in cells if c["task"] == task and c["part"] == "ladder" and c["loss"] is not None]
        floats = {c["label"]: c["loss"] for c in own if c["scheme"] == FLOAT}
        for scheme in ROUNDED_SCHEMES:
            here = {c["label"]: c for c in own if c["scheme"] == scheme}
            after = {label: c["loss"] for label, c in here.items() if c["method"] in ROUNDED}
            if not after or not {ORIGINAL, CONTROL} <= floats.keys():
                continue
            best, target = min(after, key=lambda label: after[label]), min(floats.values())
            gap = after[best] - target
            shares = {
                label: (after[best] - c["loss"]) / gap
                for label, c in here.items()
                if c["method"] not in ROUNDED and gap > 0
            }
            out.append(
                {"task": task, "scheme": scheme, "float": floats, "rounded": after, "best": best, "recovered": shares}
            )
    return rounded(out)


def by_rate(cells: Iterable[Cell], store: Store) -> list[dict[str, Any]]:
    """SGD's held-out figures at every rate of the sweep: where a method merely rescales gradients, rates make up."""
    out = []
    for cell in cells:
        if cell.optimizer != "sgd" or cell.scheme == FLOAT:
            continue
        rates = [(rate, store.get(cell.job(rate, SWEEP_SEED))) for rate in RATES]
        values = {str(rate): row["held_accuracy"] for rate, row in rates if row is not None}
        if values:
            out.append({"task": cell.task, "scheme": cell.scheme, "label": cell.label, "accuracy": values})
    return out
