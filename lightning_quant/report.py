"""What was quantized, what was not, and why: the report every front end prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One line of a report.

    Attributes:
        path: Module path.
        what: Grid in words for attached layers, reason for the others.
        share: Share of the model's weights, in [0, 1].
    """

    path: str
    what: str
    share: float


@dataclass
class Report:
    """What ``attach`` did: attached layers, layers left out on purpose, weights nothing here can reach.

    ``setup`` is the report of the transforms that ran before, or None.
    """

    attached: list[Entry] = field(default_factory=list)
    excluded: list[Entry] = field(default_factory=list)
    unsupported: list[Entry] = field(default_factory=list)
    setup: Any = None

    @property
    def coverage(self) -> float:
        """Share of the model's weights that are quantized."""
        return sum(e.share for e in self.attached)

    def __str__(self) -> str:
        """A table; layers that differ only in their number share a line."""
        lines = [] if self.setup is None else [f"set-up: {self.setup}"]
        lines += [f"{self.coverage:6.1%} of the weights in {len(self.attached)} quantized layers"]
        for title, entries in (
            ("quantized", self.attached),
            ("left in float", self.excluded),
            ("NOT REACHED", self.unsupported),
        ):
            merged: dict[tuple[str, str], list[float]] = {}
            for e in entries:
                pattern = ".".join("*" if part.isdigit() else part for part in e.path.split("."))
                merged.setdefault((pattern, e.what), []).append(e.share)
            for (pattern, what), shares in merged.items():
                lines.append(f"{sum(shares):6.1%}  {title:<13}  {len(shares):>4} x {pattern}: {what}")
        return "\n".join(lines)
