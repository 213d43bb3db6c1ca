"""What the accuracy ladder runs next: learning rates are swept, then paired seeds follow, breadth first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ladder.methods import (
    BUDGETED,
    CONVOLUTIONAL,
    FIRST_SEED,
    LADDER,
    METHODS,
    REFERENCES,
    ROUNDED,
    ROUNDED_SCHEMES,
    SEARCH,
    SEARCH_SCHEMES,
    SWEEP_SEED,
    Entry,
)
from ladder.store import FLOAT, Job, Store
from ladder.tasks import RATES, TASKS

EXTENSIONS = 2  # how often a sweep whose best rate is its smallest or largest goes on beyond it
ORIGINAL, CONTROL = "float", "float, fine-tuned"


@dataclass(frozen=True)
class Cell:
    """One method at one width on one task: an entry of the leaderboard.

    Args:
        task: Name in ``TASKS``.
        optimizer: ``adamw`` or ``sgd``.
        scheme: Bits, or ``float``.
        label: What the table calls the method.
        method: As in ``Job``.
        options: As in ``Job.make``.
        steps: Optimizer steps.
        part: ``ladder``, ``search`` or ``budget``.
        budget: Share of the float training's steps, in ``budget`` alone.
        swept: Whether it has a learning rate to choose.
        follows: Takes its learning rate from that cell instead.
    """

    task: str
    optimizer: str
    scheme: str
    label: str
    method: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    part: str = "ladder"
    budget: float | None = None
    swept: bool = True
    follows: Cell | None = None

    def job(self, lr: float, seed: int) -> Job:
        """One of its runs."""
        shared = {"task": self.task, "scheme": self.scheme, "method": self.method, "steps": self.steps}
        return Job.make(dict(self.options), **shared, optimizer=self.optimizer, lr=lr, seed=seed)

    def seeds(self, count: int) -> list[int]:
        """Of its runs on the test part; the float checkpoint as it is has but one."""
        first = FIRST_SEED[self.task]
        return [first + i for i in range(1 if self.method == FLOAT and not self.steps else count)]

    def sweep(self, store: Store) -> tuple[list[float], float | None]:
        """Rates still to be tried, and the best one if there are none."""
        if self.follows is not None:
            missing, best = self.follows.sweep(store)
            return [], None if missing else best
        if not self.swept:
            return [], 0.0
        rates = list(TASKS[self.task].rates[self.optimizer])
        for _ in range(EXTENSIONS + 1):
            missing = [rate for rate in rates if store.get(self.job(rate, SWEEP_SEED)) is None]
            if missing:
                return missing, None
            best = max(rates, key=lambda rate: quality(store.get(self.job(rate, SWEEP_SEED)) or {}))
            beyond = next_rate(rates, best)
            if beyond is None:
                break
            rates.append(beyond)
        return [], best

    def jobs(self, store: Store, seeds: int) -> Iterator[tuple[int, Job]]:
        """Its runs that can start now, each with its round: the sweep and the first seed in 0, the second in 1, ..."""
        missing, best = self.sweep(store)
        for rate in missing:
            yield 0, self.job(rate, SWEEP_SEED)
        if best is not None:
            for number, seed in enumerate(self.seeds(seeds)):
                job = self.job(best, seed)
                if store.get(job) is None:
                    yield number, job

    def left(self, store: Store, seeds: int) -> int:
        """How many runs it takes to its end, if its sweep is not extended."""
        missing, best = self.sweep(store)
        if best is None:
            own = len(self.seeds(seeds))
            return own if self.follows else len(missing) + own
        return sum(1 for _ in self.jobs(store, seeds))


def next_rate(rates: list[float], best: float) -> float | None:
    """The neighbour of a best rate that is the smallest or the largest of those tried; None inside of them.

    >>> next_rate([3e-4, 1e-3, 3e-3], 3e-3), next_rate([3e-4, 1e-3, 3e-3], 1e-3)
    (0.01, None)
    """
    place = RATES.index(best)
    if best == max(rates) and place + 1 < len(RATES):
        return RATES[place + 1]
    if best == min(rates) and place > 0:
        return RATES[place - 1]
    return None


def quality(row: Mapping[str, Any]) -> float:
    """What the best learning rate has most of: the held-out part's loss, negated.

    Also where accuracies are compared: those of some hundred rows differ by chance more than rates make them differ.
    """
    loss = row["held_loss"]
    return -math.inf if loss is None else -float(loss)


def queue(cells: Iterable[Cell], store: Store, seeds: int) -> list[tuple[Cell, Job]]:
    """All runs that can start now, in order: round by round, and within a round as the cells come."""
    found = [(number, i, cell, job) for i, cell in enumerate(cells) for number, job in cell.jobs(store, seeds)]
    return [(cell, job) for _, _, cell, job in sorted(found, key=lambda f: f[:2])]


def ladder(
    tasks: Iterable[str], schemes: list[str] | None, methods: list[str] | None, optimizers: list[str] | None
) -> list[Cell]:
    """The leaderboard's cells with their controls; None: all that the ladder has."""
    cells: list[Cell] = []
    for task in tasks:
        steps = TASKS[task].steps
        for optimizer, widths in LADDER[task].items():
            if optimizers and optimizer not in optimizers:
                continue
            cells += controls(task, optimizer, steps)
            for scheme in widths if schemes is None else [w for w in widths if w in schemes]:
                for label, entry in METHODS.items():
                    if (not methods or label in methods) and fits(task, scheme, entry):
                        cells.append(Cell(task, optimizer, scheme, label, entry.method, steps, entry.options))
                if TASKS[task].kind == "language" and scheme in ROUNDED_SCHEMES:
                    cells += rounded(cells, task, scheme)
    return cells


def fits(task: str, scheme: str, entry: Entry) -> bool:
    return scheme in entry.widths and (task in CONVOLUTIONAL or not entry.convolutional)


def controls(task: str, optimizer: str, steps: int, **more: Any) -> list[Cell]:
    """The float checkpoint, and it after as many steps in float."""
    original = Cell(task, optimizer, FLOAT, ORIGINAL, FLOAT, 0, swept=False, **more)
    return [original, Cell(task, optimizer, FLOAT, CONTROL, FLOAT, steps, **more)]


def rounded(cells: list[Cell], task: str, scheme: str) -> list[Cell]:
    """Post-training methods, from the float checkpoint and from the fine-tuned one."""
    control = next(c for c in cells if c.task == task and c.label == CONTROL)
    out = []
    for name, options in ROUNDED.items():
        shared: dict[str, Any] = {"task": task, "optimizer": "adamw", "scheme": scheme, "method": name}
        shared["options"] = options
        out.append(Cell(**shared, label=f"{name} of {ORIGINAL}", steps=0, swept=False))
        out.append(Cell(**shared, label=f"{name} of {CONTROL}", steps=control.steps, follows=control))
    return out


def search(tasks: Iterable[str], schemes: list[str] | None, variants: list[str] | None) -> list[Cell]:
    """PEGE's variants (None: all) beside what they are compared with."""
    entries = {label: (METHODS[label].method, METHODS[label].options) for label in REFERENCES}
    entries |= {label: entry for label, entry in SEARCH.items() if not variants or label in variants}
    return [
        Cell(task, "adamw", scheme, label, method, TASKS[task].steps, options, part="search")
        for task in tasks
        for scheme in schemes or SEARCH_SCHEMES
        if scheme in LADDER[task]["adamw"]
        for label, (method, options) in entries.items()
    ]


def budgets(
    tasks: Iterable[str], shares: Iterable[float], schemes: list[str] | None, methods: list[str] | None
) -> list[Cell]:
    """Some methods with shares of the steps that the float training took."""
    cells: list[Cell] = []
    for task in tasks:
        for share in shares:
            steps = max(1, round(share * TASKS[task].pretrain))
            cells += controls(task, "adamw", steps, part="budget", budget=share)
            for scheme in schemes or ("w2",):
                for label in methods or BUDGETED:
                    entry = METHODS[label]
                    if fits(task, scheme, entry):
                        more: dict[str, Any] = {"options": entry.options, "part": "budget", "budget": share}
                        cells.append(Cell(task, "adamw", scheme, label, entry.method, steps, **more))
    return cells
