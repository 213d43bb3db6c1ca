"""The accuracy ladder's figures as Markdown: an overview for the README, and the whole leaderboard."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from ladder.methods import CONFIRM_TASKS, FIRST_SEED, SEARCH
from ladder.plan import CONTROL, ORIGINAL
from ladder.store import FLOAT
from ladder.summary import BASE, DEFAULT, verdict
from ladder.tasks import TASKS

Cells = list[dict[str, Any]]


def table(results: dict[str, Any]) -> str:
    """The overview: who is better than STE how often, the default everywhere, and what QAT recovers."""
    cells = results["cells"]
    parts = [intro(results)]
    for make in (methods_table, default_table, floats_table):
        parts.append(make([c for c in cells if c["part"] == "ladder"]))
    parts += [recovered_table(results["recovered"]), search_table(cells), budget_table(cells), rates_table(results)]
    return "\n\n".join(part for part in parts if part)


def intro(results: dict[str, Any]) -> str:
    machine, n = results["machine"], max((c["n"] for c in results["cells"]), default=0)
    return (
        f"{results['runs']} runs on {machine['processor']}, one thread each, torch {results['versions']['torch']}. All "
        "methods start from the same float checkpoint and see the same data in the same order for the same number of "
        "steps, each at the learning rate whose loss on a held-out part was least (the sweep goes on beyond its ends). "
        f"Up to {n} paired seeds; +-: 95 % interval of the mean paired difference by Student's t; the hard low-bit "
        "model is measured on a test part that no learning rate was chosen on. All cells: "
        "[accuracy.md](examples/benchmarks/results/accuracy.md)."
    )


def unique(cells: Cells, name: str) -> list[Any]:
    return list(dict.fromkeys(c[name] for c in cells))


def lines(head: list[str], rows: list[list[str]]) -> str:
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(out + [f"| {' | '.join(row)} |" for row in rows])


def methods_table(cells: Cells) -> str:
    """Each method against STE over all cells."""
    rows = []
    for label in unique(cells, "label"):
        own = [c for c in cells if c["label"] == label and "against_ste" in c and "bytes" in c]
        if not own:
            continue
        said = [verdict(c) for c in own]
        wins, losses = (sum(c["against_ste"][name] for c in own) for name in ("wins", "losses"))
        counts = [said.count(value) for value in (1, 0, -1)]
        seconds = [c["seconds"] for c in own if c["seconds"]]
        held = statistics.median(c["bytes"] for c in own)
        cost = f"{statistics.median(seconds):.2f}" if seconds else ""
        rows.append([counts, [label, str(len(own)), *map(str, counts), f"{wins}/{losses}", cost, f"{held:.2g}"]])
    rows.sort(key=lambda row: (row[0][2] - row[0][0], -row[0][0]))
    head = ["method", "cells", "better", "undecided", "worse", "seeds won/lost", "step time", "bytes per weight"]
    if not rows:
        return ""
    said = "Against `ste` with its own swept rate, by cell (task, scheme and optimizer); step time: of STE's."
    return f"{said}\n\n{lines(head, [row for _, row in rows])}"


def default_table(cells: Cells) -> str:
    """The default and the best method of every cell."""
    rows = []
    for task in unique(cells, "task"):
        for optimizer in unique(cells, "optimizer"):
            of_task = [c for c in cells if (c["task"], c["optimizer"]) == (task, optimizer) and "bytes" in c]
            for scheme in unique(of_task, "scheme"):
                here = {c["label"]: c for c in of_task if c["scheme"] == scheme}
                if BASE not in here:
                    continue
                best = min(here.values(), key=order(task))
                cells_of = [task + " (confirmation)" * (task in CONFIRM_TASKS), scheme, optimizer]
                cells_of += [mean(here[BASE]), gap(here.get(DEFAULT, {})), best["label"], mean(best), gap(best)]
                cells_of.append(gap(best, "against_default"))
                rows.append(cells_of)
    head = ["task", "scheme", "optimizer", "`ste`", f"`{DEFAULT}`: difference", "best", "its figure", "difference"]
    head.append(f"to `{DEFAULT}`")
    return lines(head, rows) if rows else ""


def order(task: str) -> Callable[[dict[str, Any]], float]:
    """Best first."""
    if TASKS[task].counts == "accuracy":
        return lambda c: -c["accuracy"]
    return lambda c: float("inf") if c["loss"] is None else c["loss"]


def mean(cell: dict[str, Any], name: str | None = None) -> str:
    """What counts, as a percentage or a loss."""
    name = name or TASKS[cell["task"]].counts
    if cell[name] is None:
        return "diverged"
    return f"{100 * cell[name]:.2f} %" if name == "accuracy" else f"{cell[name]:.4f}"


def gap(cell: dict[str, Any], against: str = "against_ste") -> str:
    """The paired difference to STE (or the default), in bold where its interval leaves out 0."""
    pair = cell.get(against)
    if not pair:
        return ""
    if pair["difference"] is None:
        return "diverged"
    unit, digits = (100, 2) if TASKS[cell["task"]].counts == "accuracy" else (1, 4)
    text = f"{unit * pair['difference']:+.{digits}f}"
    if pair["interval"] is not None:
        text += f" +- {unit * pair['interval']:.{digits}f}"
    return f"**{text}**" if verdict(cell, against) else text


def floats_table(cells: Cells) -> str:
    """The tasks with their float models."""
    rows = []
    for task in unique(cells, "task"):
        own = [c for c in cells if c["task"] == task and c["scheme"] == FLOAT and c["optimizer"] == "adamw"]
        known = {c["label"]: f"{mean(c, 'loss')}, {mean(c, 'accuracy')}" for c in own}
        about, seed = TASKS[task].about, FIRST_SEED[task]
        steps = f"{TASKS[task].pretrain}, {TASKS[task].steps}"
        rows.append([task, about, steps, known.get(ORIGINAL, ""), known.get(CONTROL, ""), f"from {seed}"])
    head = ["task", "what", "steps in float, then per run", "float: loss, accuracy", "fine-tuned in float", "seeds"]
    return lines(head, rows) if rows else ""


def recovered_table(found: list[dict[str, Any]]) -> str:
    """Of the gap between post-training methods and float."""
    rows = []
    for case in found:
        shares = sorted(case["recovered"].items(), key=lambda pair: -pair[1])
        if not shares:
            continue
        target = min(case["float"].values())
        chosen = dict(shares).get(DEFAULT)
        own = "" if chosen is None else f"{100 * chosen:.0f} %"
        best = f"{shares[0][0]}: {100 * shares[0][1]:.0f} %"
        row = [case["task"], case["scheme"], f"{case['best']}: {case['rounded'][case['best']]:.4f}", f"{target:.4f}"]
        rows.append([*row, own, best, str(sum(share >= 0.6 for _, share in shares)), str(len(shares))])
    head = ["task", "scheme", "best after training", "better float", f"`{DEFAULT}` recovers", "best recovers"]
    head += ["methods with 60 %", "of"]
    said = (
        "Share of the gap between the best post-training method and the better of the two float models that is closed:"
    )
    return f"{said}\n\n{lines(head, rows)}" if rows else ""


def search_table(cells: Cells) -> str:
    """PEGE's variants on the search part."""
    own = [c for c in cells if c["part"] == "search"]
    places = list(dict.fromkeys((c["task"], c["scheme"]) for c in own if c["label"] in SEARCH))
    own = [c for c in own if (c["task"], c["scheme"]) in places]
    rows = []
    for label in unique(own, "label"):
        here = {(c["task"], c["scheme"]): c for c in own if c["label"] == label}
        said = [verdict(c) for c in here.values()]
        figures = [(gap(here[p]) or mean(here[p])) if p in here else "" for p in places]
        rows.append([label, *figures, f"{said.count(1)}/{said.count(-1)}"])
    head = ["variant", *(f"{task} {scheme}" for task, scheme in places), "better/worse"]
    said = "The search of PEGE's recipe, one change at a time: differences to `ste`, its own figure."
    return f"{said}\n\n{lines(head, rows)}" if rows else ""


def budget_table(cells: Cells) -> str:
    """What to use with a share of the float training's steps."""
    own = [c for c in cells if c["part"] == "budget" and c["scheme"] != FLOAT]
    rows = []
    for task in unique(own, "task"):
        for scheme in unique(own, "scheme"):
            for share in sorted(unique(own, "budget")):
                key = (task, scheme, share)
                here = [c for c in own if (c["task"], c["scheme"], c["budget"]) == key]
                for rank, c in enumerate(sorted(here, key=order(task))):
                    where = [task, scheme, f"{100 * share:g} % ({c['steps']} steps)"] if not rank else ["", "", ""]
                    rows.append([*where, c["label"], mean(c), gap(c), f"{c['lr']:g}"])
    head = ["task", "scheme", "budget", "method, best first", "figure", "difference to STE", "rate"]
    said = "What to use with 1 %, 10 % and 100 % of the steps that the float training took:"
    return f"{said}\n\n{lines(head, rows)}" if rows else ""


def rates_table(results: dict[str, Any]) -> str:
    """SGD by learning rate."""
    found = results["by_rate"]
    rates = sorted({float(r) for case in found for r in case["accuracy"]})
    rows = []
    for case in found:
        known = {float(r): value for r, value in case["accuracy"].items()}
        figures = [f"{100 * known[r]:.1f}" if r in known else "" for r in rates]
        rows.append([case["task"], case["scheme"], case["label"], *figures])
    said = "SGD with momentum, held-out accuracy in % of one run per learning rate:"
    return f"{said}\n\n{lines(['task', 'scheme', 'method', *(f'{r:g}' for r in rates)], rows)}" if rows else ""


def leaderboard(results: dict[str, Any]) -> str:
    """Every cell of the ladder."""
    cells = [c for c in results["cells"] if c["part"] == "ladder"]
    parts = ["# Leaderboard", intro(results).rsplit(" All cells:", 1)[0]]
    for task in unique(cells, "task"):
        parts.append(f"## {task}: {TASKS[task].about}")
        of_task = [c for c in cells if c["task"] == task]
        places = [(o, s) for o in unique(of_task, "optimizer") for s in unique(of_task, "scheme")]
        for optimizer, scheme in places:
            here = [c for c in of_task if (c["optimizer"], c["scheme"]) == (optimizer, scheme)]
            if here:
                parts.append(f"### {task}, {scheme}, {optimizer}")
                parts.append(lines(HEAD, [line(c) for c in sorted(here, key=order(task))]))
    return "\n\n".join(parts) + "\n"


HEAD = ["method", "n", "loss", "accuracy", "difference to STE", "won/lost", "rate", "step time", "bytes per weight"]


def line(c: dict[str, Any]) -> list[str]:
    pair = c.get("against_ste")
    known = [f"{pair['wins']}/{pair['losses']}" if pair else "", f"{c['lr']:g}{'!' * c['edge']}" if "lr" in c else ""]
    cost = f"{c['seconds']:.2f}" if c.get("seconds") else ""
    held = f"{c['bytes']:.3g}" if "bytes" in c else ""
    figures = [plus_minus(c, "loss"), plus_minus(c, "accuracy")]
    return [c["label"], str(c["n"]), *figures, gap(c), *known, cost, held]


def plus_minus(c: dict[str, Any], name: str) -> str:
    """A mean with its standard deviation over seeds."""
    spread = c[f"{name}_deviation"]
    if spread is None or c[name] is None:
        return mean(c, name)
    return f"{mean(c, name)} (sd {100 * spread:.2f})" if name == "accuracy" else f"{mean(c, name)} (sd {spread:.4f})"
