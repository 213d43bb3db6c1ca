"""Paired differences: what n seeds say about two methods that saw the same data in the same order."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple


class Paired(NamedTuple):
    """A method against another, seed by seed.

    Attributes:
        n: Seeds that both have.
        difference: Mean of method minus base.
        interval: Half the width of the mean's 95 % interval by Student's t; None with less than two seeds.
        wins: Seeds on which the method is better.
        losses: Seeds on which it is worse.
    """

    n: int
    difference: float
    interval: float | None
    wins: int
    losses: int


def paired(method: Mapping[int, float], base: Mapping[int, float], more_is_better: bool) -> Paired | None:
    """Compare two methods on the seeds that both have; None if there are none.

    Args:
        method: Figure by seed; infinite where a run diverged.
        base: Likewise.
        more_is_better: Accuracies, not losses.

    >>> paired({0: 1.0, 1: 3.0}, {0: 0.0, 1: 1.0, 2: 5.0}, more_is_better=True)[:2]
    (2, 1.5)
    """
    seeds = sorted(method.keys() & base.keys())
    if not seeds:
        return None
    sign = 1 if more_is_better else -1
    wins = sum(sign * method[s] > sign * base[s] for s in seeds)
    losses = sum(sign * method[s] < sign * base[s] for s in seeds)
    finite = all(math.isfinite(method[s]) and math.isfinite(base[s]) for s in seeds)
    gaps = [method[s] - base[s] for s in seeds] if finite else []
    mean = statistics.mean(gaps) if gaps else math.nan
    return Paired(len(seeds), mean, half_width(gaps), wins, losses)


def half_width(values: list[float], share: float = 0.95) -> float | None:
    """Half the width of a mean's confidence interval: t(n - 1) * s / sqrt(n)."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf((1 + share) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
