"""What the directories that a page is made from hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from lightning_quant.checkpoint import CONFIG_FILE, STATE_FILE
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export import FORMATS
from lightning_quant.export.atomic import SUMS
from lightning_quant.export.card import TRAINER_STATE

METRICS, EVENTS, SENSITIVITY = "metrics.csv", "events.out.tfevents.*", "sensitivity.json"


@dataclass(frozen=True)
class Sources:
    """Where each part of a page comes from; None where nothing was found.

    Attributes:
        training: A training directory of transformers' Trainer, with quantization's files.
        export: What ``export`` wrote.
        logs: ``trainer_state.json``, ``metrics.csv`` or an event file.
        checkpoint: A checkpoint of Lightning, the newest one.
        sensitivity: Figures that ``lightning-quant sensitivity --json`` wrote.
    """

    training: Path | None = None
    export: Path | None = None
    logs: Path | None = None
    checkpoint: Path | None = None
    sensitivity: Path | None = None


def find_sources(directories: Sequence[Path]) -> Sources:
    """Look into directories of one run: its training directory or logs, its export, both, in any order.

    Raises:
        CheckpointError: A directory that is neither, or two of one kind.
    """
    found: dict[str, Path] = {}
    for directory in directories:
        for kind, path in _held(directory).items():
            if kind in found and found[kind] != path:
                expected, cure = f"one place with {kind}", "Others to compare with go behind --compare."
                raise CheckpointError(explain("report", expected, f"{found[kind]} and {path}", cure))
            found[kind] = path
    if "export" not in found:
        inside = [c for d in directories for c in sorted(d.iterdir()) if c.is_dir() and is_export(c)]
        found |= {"export": inside[0]} if len(inside) == 1 else {}
    return Sources(**found)


def is_export(directory: Path) -> bool:
    """Whether a directory is an export: a plain float checkpoint or a training directory is none."""
    if (directory / STATE_FILE).is_file():
        return False
    kinds = [name for name, format in FORMATS.items() if format.holds(directory)]
    return kinds not in ([], ["folded"]) or (
        bool(kinds) and any((directory / f).is_file() for f in (SUMS, CONFIG_FILE))
    )


def newest_checkpoint(directory: Path, file: str) -> Path | None:
    """The directory itself, or its ``checkpoint-N`` with the largest N that has a file; None if none has."""
    numbered = [
        (int(m[1]), p) for p in directory.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    places = [directory, *(p for _, p in sorted(numbered, reverse=True))]
    return next((p for p in places if (p / file).is_file()), None)


def _held(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        cure = "Point at a training directory, a run's log directory or an export."
        raise CheckpointError(explain(str(directory), "a directory", "none of that name", cure))
    training, state = (newest_checkpoint(directory, file) for file in (STATE_FILE, TRAINER_STATE))
    export = directory if training is None and is_export(directory) else None
    logs = None if state is None else state / TRAINER_STATE
    if logs is None and export is None:
        logs = _logs(directory)
    checkpoints = sorted(directory.rglob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns) if state is None else []
    sensitivity = directory / SENSITIVITY
    parts = (training, export, logs, checkpoints[-1] if checkpoints else None)
    held = {
        f.name: p for f, p in zip(fields(Sources), (*parts, sensitivity), strict=True) if p is not None and p.exists()
    }
    if not held:
        expected = (
            f"a training directory ({STATE_FILE}), a run's logs ({TRAINER_STATE}, {METRICS}, events) or an export"
        )
        got = ", ".join(sorted(p.name for p in directory.iterdir())[:6]) or "an empty directory"
        cure = "Name the directory that Trainer, a logger of Lightning or export() wrote into."
        raise CheckpointError(explain(str(directory), expected, got, cure))
    return held


def _logs(directory: Path) -> Path | None:
    """The one log of Lightning in a directory or below it; a table rather than events."""
    for pattern in (METRICS, EVENTS):
        found = sorted(directory.glob(pattern)) or sorted(directory.rglob(pattern))
        if len({p.parent for p in found}) > 1:
            got = f"{len(found)}: {', '.join(str(p.parent.relative_to(directory)) for p in found[:4])}, ..."
            raise CheckpointError(explain(str(directory), "the logs of one run", got, "Name one of them."))
        if found:
            return found[0] if pattern == METRICS else found[0].parent
    return None
