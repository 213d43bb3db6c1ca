"""Closed forms step -> value.  Nothing here holds state: a resumed run computes the same values.

Every form runs from ``start`` at step 0 to ``end`` at the last optimizer step, as a function of
``tau = step / total``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_quant.errors import explain, unknown

Curve = Callable[[float, float, float], float]


def _geometric(tau: float, start: float, end: float) -> float:
    return float(start * (end / start) ** tau)


def _hardness(tau: float, start: float, end: float) -> float:
    """Linear in K = ln(2/alpha - 1), DSQ's hardness, instead of in alpha itself."""
    k0, k1 = (math.log(2 / a - 1) for a in (start, end))
    return 2 / (1 + math.exp(k0 + (k1 - k0) * tau))


def _replacement(tau: float, start: float, end: float) -> float:
    """log_10 of a line from 10^start to 10^end: the replacement curriculum of ``pege_replace``."""
    return math.log10(10**start + (10**end - 10**start) * tau)


CURVES: dict[str, Curve] = {
    "constant": lambda tau, start, end: end,
    "linear": lambda tau, start, end: start + (end - start) * tau,
    "cosine": lambda tau, start, end: start + (end - start) * (1 - math.cos(math.pi * tau)) / 2,
    "geometric": _geometric,
    "exponential": lambda tau, start, end: start + (end - start) * math.expm1(5 * tau) / math.expm1(5),
    "logarithmic": lambda tau, start, end: start + (end - start) * math.log1p(9 * tau) / math.log1p(9),
    "hardness": _hardness,
    "replacement": _replacement,
}


@dataclass(frozen=True)
class Schedule:
    """One scheduled value.

    Args:
        curve: Name in ``CURVES``; ``constant`` is ``end`` from ``delay`` on (with no delay: throughout).
        start: Value at step 0.
        end: Value at ``until`` and after.
        delay: Share of the run, in [0, 1), for which the value stays at ``start``.
        until: Share of the run at which ``end`` is reached.
    """

    curve: str = "constant"
    start: float = 0.0
    end: float = 0.0
    delay: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ValueError(unknown("curve", self.curve, CURVES, "Schedule.curve"))
        if self.curve == "geometric" and not (self.start > 0 and self.end > 0):
            raise ValueError(
                explain("Schedule(geometric)", "start and end above 0", (self.start, self.end), "Use 'linear'.")
            )
        if self.curve == "hardness" and not (0 < self.start < 1 and 0 < self.end < 1):
            raise ValueError(
                explain("Schedule(hardness)", "alphas in (0, 1)", (self.start, self.end), "Use .2 and .02.")
            )
        if not 0 <= self.delay < self.until <= 1:
            raise ValueError(
                explain("Schedule", "0 <= delay < until <= 1", (self.delay, self.until), "They are shares of the run.")
            )

    @property
    def needs_total(self) -> bool:
        """Whether the value depends on how long the run is."""
        return self.start != self.end and (self.curve != "constant" or self.delay > 0)

    @property
    def first(self) -> float:
        """Value at step 0."""
        return self.start if self.needs_total else self.end

    def __call__(self, step: int, total: int | None) -> float:
        """Value at an optimizer step.

        Args:
            step: Optimizer steps done so far.
            total: Optimizer steps of the whole run.

        Raises:
            ValueError: The schedule moves and ``total`` is not known.
        """
        if not self.needs_total:
            return self.end
        if total is None or total <= 0:
            raise ValueError(
                explain(
                    f"Schedule({self.curve!r})",
                    "the number of optimizer steps of the run",
                    total,
                    "Set max_steps or max_epochs of the trainer, or choose the 'constant' curve.",
                )
            )
        tau = (step / total - self.delay) / (self.until - self.delay)
        if tau < 0 or (tau == 0 and self.curve != "constant"):
            return self.start
        return CURVES[self.curve](min(tau, 1.0), self.start, self.end)


def as_schedule(value: Any, where: str) -> Schedule:
    """A number, a mapping of ``Schedule`` fields, or a ``Schedule``, as a ``Schedule``."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, (int, float)):
        return Schedule("constant", float(value), float(value))
    if isinstance(value, Mapping):
        try:
            return Schedule(**value)
        except TypeError as error:
            raise ValueError(explain(where, "the fields of Schedule", dict(value), str(error))) from error
    raise ValueError(explain(where, "a number or a mapping of Schedule fields", repr(value), "See Schedule."))
