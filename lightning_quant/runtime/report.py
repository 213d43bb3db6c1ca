"""What runs on which kernel, and why not on another: the answer to "is this fast?"."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One layer.

    Attributes:
        path: Its place in the model.
        kernel: ``int4``, ``int8``, ``w8a8`` or ``dense`` (the weight was dequantized).
        reason: Why, where the answer is not the format's own kernel.
    """

    path: str
    kernel: str
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All quantized layers of a model; printing it gives one line per kernel and reason."""

    lines: tuple[Line, ...]

    def __str__(self) -> str:
        """One line per kernel and reason, with the number of layers and the first of them."""
        count = Counter((line.kernel, line.reason) for line in self.lines)
        first = {(line.kernel, line.reason): line.path for line in reversed(self.lines)}
        rows = []
        for (kernel, reason), n in count.items():
            why = f": {reason}" if reason else ""
            rows.append(f"{kernel}{why}: {n} layer(s), first {first[kernel, reason]}")
        return "\n".join(rows)
