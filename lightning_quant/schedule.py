"""Closed forms step -> value.  Nothing here holds state: a resumed run computes the same values.

A curve runs from a = ``start`` to b = ``end`` while tau, the share of the ramp that is done, goes from 0 (at the
share ``delay`` of the run's optimizer steps) to 1 (at the share ``until``):

    constant     b
    linear       a + (b - a) tau
    cosine       a + (b - a) (1 - cos(pi tau)) / 2
    geometric    a (b / a)^tau
    exponential  a + (b - a) (e^(5 tau) - 1) / (e^5 - 1)
    logarithmic  a + (b - a) ln(1 + kappa tau) / ln(1 + kappa), kappa = base - 1
    sigmoid      a + (b - a) (s(tau) - s(0)) / (s(1) - s(0)), s(tau) = 1 / (1 + e^(-10 (tau - 1/2)))
    adaround     a + (b - a) max(0, (tau - 0.2) / 0.8)
    hardness     2 / (1 + e^K), K on a line from ln(2/a - 1) to ln(2/b - 1)
    replacement  log_B(B^a + (B^b - B^a) tau), B = base

``piecewise`` and ``steps`` read a table instead, ``points``, whose shares are of the whole run.
"""

from __future__ import annotations

import itertools
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_quant.errors import explain, unknown


def _geometric(tau: float, s: Schedule) -> float:
    return float(s.start * (s.end / s.start) ** tau)


def _sigmoid(tau: float, s: Schedule) -> float:
    """The normalised logistic, written as a tanh: odd around the middle, so that both ends are exact."""
    return s.start + (s.end - s.start) * (1 + math.tanh(5 * (tau - 0.5)) / math.tanh(2.5)) / 2


def _adaround(tau: float, s: Schedule) -> float:
    """Linear after a fifth: the exponent beta of AdaRound's regulariser in the code of MQBench and BRECQ."""
    return s.start + (s.end - s.start) * max(0.0, (5 * tau - 1) / 4)


def _hardness(tau: float, s: Schedule) -> float:
    """Linear in K = ln(2/alpha - 1), DSQ's hardness, instead of in alpha itself."""
    k0, k1 = (math.log(2 / a - 1) for a in (s.start, s.end))
    return 2 / (1 + math.exp(k0 + (k1 - k0) * tau))


def _logarithmic(tau: float, s: Schedule) -> float:
    return s.start + (s.end - s.start) * math.log1p((s.base - 1) * tau) / math.log1p(s.base - 1)


def _replacement(tau: float, s: Schedule) -> float:
    """log_B of a line from B^start to B^end: the replacement curriculum of ``pege_replace``."""
    x = s.base**s.start + (s.base**s.end - s.base**s.start) * tau
    return math.log10(x) if s.base == 10 else math.log(x, s.base)  # log(x, 10) rounds twice


def _reached(tau: float, s: Schedule) -> int:
    """How many points lie at or before ``tau``."""
    return bisect_right(s.points, tau, key=lambda point: point[0])


def _piecewise(tau: float, s: Schedule) -> float:
    """The line between the points on both sides of ``tau``."""
    n = _reached(tau, s)
    if n in (0, len(s.points)):
        return s.end if n else s.start
    (t0, v0), (t1, v1) = s.points[n - 1 : n + 1]
    return v0 + (v1 - v0) * ((tau - t0) / (t1 - t0))


def _steps(tau: float, s: Schedule) -> float:
    """The last point at or before ``tau``."""
    return s.points[max(_reached(tau, s), 1) - 1][1]


Curve = Callable[[float, "Schedule"], float]
CURVES: dict[str, Curve] = {
    "constant": lambda tau, s: s.end,
    "linear": lambda tau, s: s.start + (s.end - s.start) * tau,
    "cosine": lambda tau, s: s.start + (s.end - s.start) * (1 - math.cos(math.pi * tau)) / 2,
    "geometric": _geometric,
    "exponential": lambda tau, s: s.start + (s.end - s.start) * math.expm1(5 * tau) / math.expm1(5),
    "logarithmic": _logarithmic,
    "sigmoid": _sigmoid,
    "adaround": _adaround,
    "hardness": _hardness,
    "replacement": _replacement,
    "piecewise": _piecewise,
    "steps": _steps,
}


@dataclass(frozen=True)
class Schedule:
    """One scheduled value.

    Args:
        curve: Name in ``CURVES``; ``constant`` is ``end`` from ``delay`` on (with no delay: throughout).
        start: Value at step 0; read off ``points`` where there are some.
        end: Value at ``until`` and after; read off ``points`` likewise.
        delay: Share of the run, in [0, 1), for which the value stays at ``start``.  ``adaround`` then
            stays there for a fifth of the rest, up to ``until``, as well.
        until: Share of the run at which ``end`` is reached.
        base: Base of ``logarithmic`` and ``replacement``, above 1: the larger, the steeper the beginning.
        points: Pairs (share of the run in [0, 1], value) by growing share.  ``piecewise`` is linear between
            them, ``steps`` keeps each value until the next point; both are constant outside of them.
    """

    curve: str = "constant"
    start: float = 0.0
    end: float = 0.0
    delay: float = 0.0
    until: float = 1.0
    base: float = 10.0
    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ValueError(unknown("curve", self.curve, CURVES, "Schedule.curve"))
        where = f"Schedule({self.curve})"
        if self.curve == "geometric" and not (self.start > 0 and self.end > 0):
            raise ValueError(explain(where, "start and end above 0", (self.start, self.end), "Use 'linear'."))
        if self.curve == "hardness" and not (0 < self.start < 1 and 0 < self.end < 1):
            raise ValueError(explain(where, "alphas in (0, 1)", (self.start, self.end), "Use .2 and .02."))
        if not 0 <= self.delay < self.until <= 1:
            raise ValueError(
                explain(where, "0 <= delay < until <= 1", (self.delay, self.until), "Use shares of the run.")
            )
        if not 1 < self.base < math.inf:
            raise ValueError(explain(f"{where}.base", "a finite number above 1", self.base, "Use for example 10."))
        if self.base != 10 and self.curve not in ("logarithmic", "replacement"):
            raise ValueError(explain(where, "no base", self.base, "Only 'logarithmic' and 'replacement' have one."))
        if self.curve in ("piecewise", "steps"):
            self._read_points(where)
        elif self.points:
            raise ValueError(explain(where, "no points", self.points, "Choose curve 'piecewise' or 'steps' for them."))
        else:
            object.__setattr__(self, "points", ())  # YAML writes an empty tuple as a list

    def _read_points(self, where: str) -> None:
        """Check the points, make them hashable and take start and end from them."""
        try:
            points = tuple((float(share + 0.0), float(value + 0.0)) for share, value in self.points)  # not of strings
        except (TypeError, ValueError):
            points = ()
        shares, values = [p[0] for p in points], [p[1] for p in points]
        grows = all(a < b for a, b in itertools.pairwise(shares))
        if not (points and grows and shares[0] >= 0 and shares[-1] <= 1 and all(map(math.isfinite, values))):
            expected = "one or more pairs (share of the run in [0, 1], finite value) by growing share"
            example = "Write for example [[0, 0.5], [0.25, 0.75], [1, 1]]."
            raise ValueError(explain(f"{where}.points", expected, repr(self.points), example))
        given = (self.start, self.end, self.delay, self.until)
        if given not in ((0, 0, 0, 1), (values[0], values[-1], 0, 1)):
            cure = "Leave out start, end, delay and until: the points say it all."
            raise ValueError(explain(where, "points alone", f"(start, end, delay, until) = {given} as well", cure))
        for name, value in (("points", points), ("start", values[0]), ("end", values[-1])):
            object.__setattr__(self, name, value)

    @property
    def values(self) -> tuple[float, ...]:
        """The values the curve joins; it never leaves their range."""
        if self.points:
            return tuple(value for _, value in self.points)
        return (self.end,) if self.curve == "constant" and not self.delay else (self.start, self.end)

    @property
    def needs_total(self) -> bool:
        """Whether the value depends on how long the run is."""
        return len(set(self.values)) > 1

    @property
    def first(self) -> float:
        """Value at step 0."""
        return self.values[0]

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
        return self.end if tau >= 1 else CURVES[self.curve](tau, self)


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


def delay_steps(delay: float, total: int | None) -> int:
    """The first quantized optimizer step: ``QuantConfig.delay`` of a run of so many steps.

    Raises:
        ValueError: A share of a run whose length is not known.

    >>> delay_steps(0.1, 30), delay_steps(7, None)
    (3, 7)
    """
    if delay == 0 or delay >= 1:
        start = int(delay)
    elif total is None:
        expected, cure = "the number of optimizer steps of the run", "Set max_steps or max_epochs, or give it in steps."
        raise ValueError(explain(f"QuantConfig.delay={delay}", expected, None, cure))
    else:
        start = math.ceil(round(delay * total, 6))  # 0.1 * 30 is a little more than 3
    if total is not None and 0 < total <= start:
        expected, cure = f"less than the run's {total} optimizer steps", "Nothing will train quantized: shorten it."
        warnings.warn(explain("QuantConfig.delay", expected, start, cure), stacklevel=2)
    return start
