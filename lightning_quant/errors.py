"""Error messages that say what was expected, what came, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def explain(where: str, expected: str, got: object, cure: str) -> str:
    """Compose the four parts every error of this package has.

    Args:
        where: Module path, file or argument at fault.
        expected: What would have been accepted.
        got: What came instead.
        cure: What the user can do about it.

    Returns:
        One line, ``where: expected ..., got ... . cure``.
    """
    return f"{where}: expected {expected}, got {got}. {cure}"


def unknown(kind: str, name: object, known: Iterable[str], where: str) -> str:
    """Message for a name that no table knows: lists the table and the nearest entry.

    >>> unknown("method", "peg", ["pege", "ste"], "QuantConfig.method")
    "QuantConfig.method: expected one of pege, ste, got 'peg'. Did you mean method 'pege'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    cure = f"Did you mean {kind} {near[0]!r}?" if near else "Use one of those."
    return explain(where, "one of " + ", ".join(names), repr(name), cure)


class CoverageError(RuntimeError):
    """A quantizer was attached and never called: the model would train or ship un-quantized there."""


class AttachError(ValueError):
    """The model, as it stands, cannot be quantized the way the config asks."""


class CheckpointError(ValueError):
    """A file on disk is missing, damaged or of another kind than expected."""
