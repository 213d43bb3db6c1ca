"""What the accuracy ladder has measured: one line of JSON per finished run, only ever appended to."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ladder.tasks import TASKS
from lightning_quant.estimators import ESTIMATORS, build_estimator
from lightning_quant.estimators import option_names as names_of
from lightning_quant.rounding.methods import ROUNDINGS

FLOAT = "float"  # the method, and the scheme, of runs without quantizers


class Job(NamedTuple):
    """One run.

    Attributes:
        task: Name in ``TASKS``.
        scheme: Bits, such as ``w2`` or ``w4a4``; ``float``.
        method: Name in ``ESTIMATORS``; ``float``: no quantizers; a name in ``ROUNDINGS``: in float, then rounded.
        options: Of ``QuantConfig.parse`` or of the rounding, as canonical JSON.
        optimizer: ``adamw`` or ``sgd``.
        lr: Peak learning rate.
        steps: Optimizer steps.
        seed: Of the order of the data and of all noise.
    """

    task: str
    scheme: str
    method: str
    options: str
    optimizer: str
    lr: float
    steps: int
    seed: int

    @staticmethod
    def make(options: dict[str, Any], **fields: Any) -> Job:
        """From options as a mapping."""
        return Job(options=canonical(options), **fields)


def canonical(value: Any) -> str:
    """JSON of which equal values have one form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@cache
def key_of(job: Job) -> str:
    """Content hash of all that decides a run's result: the task's settings and the scheme in full among it.

    A method's settings enter as they come out with its defaults filled in: a default that changes makes another run,
    and one that is spelled out the same.
    """
    options = json.loads(job.options)
    if job.method in ESTIMATORS:
        own = {k: options.pop(k) for k in names_of(ESTIMATORS[job.method]) if k in options}
        rule = build_estimator(job.method, own)
        options["method"] = {name: getattr(rule, name) for name in names_of(type(rule))}
    elif job.method in ROUNDINGS:
        options = {"rounding": options}
    task = TASKS[job.task]
    described = {**job._asdict(), "options": options, "task": task.settings()}
    if job.scheme != FLOAT:
        described["scheme"] = [task.scheme(job.scheme), task.first_last]
    return hashlib.sha256(canonical(described).encode()).hexdigest()[:16]


class Store:
    """Finished runs by key.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the run was killed in the middle of it
                continue
            self.rows[row["key"]] = row

    def get(self, job: Job) -> dict[str, Any] | None:
        """Figures of a run, None if it has not finished."""
        return self.rows.get(key_of(job))

    def add(self, job: Job, figures: dict[str, Any]) -> None:
        """Append one line in one write; a line that a killed process left unfinished is closed first."""
        row = {"key": key_of(job), **job._asdict(), "options": json.loads(job.options), **rounded(figures)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            torn = file.tell() > 0 and _last_byte(file) != b"\n"
            file.write((b"\n" if torn else b"") + canonical(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["key"]] = row


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def rounded(value: Any) -> Any:
    """Numbers with six significant digits, not finite ones as None."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value
