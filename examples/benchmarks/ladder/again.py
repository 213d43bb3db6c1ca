"""Whether a second measurement says what the first one said."""

from __future__ import annotations

from typing import Any

from ladder.summary import BASE
from ladder.tables import gap, lines

PLACE = ("part", "task", "optimizer", "scheme", "label", "steps")


def again(now: dict[str, Any], then: dict[str, Any]) -> tuple[str, bool]:
    """A table of the paired differences to STE in both, and whether all of them agree.

    They do if the second lies within the first one's 95 % interval: what the first one tells from STE is then on the
    same side of it.

    Args:
        now: Results of ``accuracy.py``.
        then: Those they are compared with; cells of one alone do not count.
    """
    before = {key(c): c for c in then["cells"]}
    rows = []
    for cell in now["cells"]:
        other = before.get(key(cell))
        if cell["label"] == BASE or other is None or not (_interval(cell) and _interval(other)):
            continue
        moved = abs(cell["against_ste"]["difference"] - other["against_ste"]["difference"])
        agrees = moved <= other["against_ste"]["interval"]
        names = [cell["task"], cell["scheme"], cell["optimizer"], cell["label"]]
        rows.append([*names, gap(other), gap(cell), "yes" if agrees else "**no**"])
    head = ["task", "scheme", "optimizer", "method", "then", "now", "within the interval"]
    found = sum(row[-1] == "yes" for row in rows)
    said = f"{found} of {len(rows)} paired differences are found again."
    return f"{said}\n\n{lines(head, rows)}", 0 < found == len(rows)


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What is the same in both."""
    return *(cell[name] for name in PLACE), cell.get("budget")


def _interval(cell: dict[str, Any]) -> bool:
    pair = cell.get("against_ste")
    return bool(pair) and None not in (pair["interval"], pair["difference"])
