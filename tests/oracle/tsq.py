"""Wang et al. 2018: sparse Lloyd-Max codes for inputs, least-squares codes for weights, float weights before."""

import math
from functools import lru_cache
from itertools import combinations

import numpy as np

from tests.oracle import Result, bounds

OPTIONS = {"theta": 0.5, "switch": 0.0}
BITS = (4, 1.58, 2, 8)
KINDS = ("channel", "group", "tensor", "static")
ASYMMETRIC = False
UNMASKED = True


@lru_cache
def lloyd_max(count, theta):
    """Levels for |N(0, 1)| above its theta-quantile epsilon, by Lloyd's iteration; and epsilon, by bisection."""
    low, high = 0.0, 40.0
    for _ in range(200):
        epsilon = (low + high) / 2
        low, high = (epsilon, high) if math.erf(epsilon / math.sqrt(2)) < theta else (low, epsilon)
    levels = epsilon + np.arange(1, count + 1) / count
    for _ in range(40 * (count + 4) ** 2):
        ends = np.array([epsilon, *(levels[1:] + levels[:-1]) / 2, 40.0])
        mass = np.array([math.erfc(t / math.sqrt(2)) for t in ends])
        density = math.sqrt(2 / math.pi) * np.exp(-(ends**2) / 2)
        means = np.diff(density) / np.diff(mass)
        if np.abs(means - levels).max() < 1e-15:
            break
        levels = means
    return levels, epsilon


def sparse(x, sigma, bits, theta):
    """0 up to epsilon, else the nearest level."""
    levels, epsilon = lloyd_max(bounds(bits)[1] - bounds(bits)[0], theta)
    nearest = levels[np.abs(x[..., None] / sigma[..., None] - levels).argmin(axis=-1)]
    return np.where(x <= epsilon * sigma, 0.0, nearest) * sigma, levels[-1] * sigma


def ternary_by_force(w):
    """alpha and the error of the best of all supports."""
    best = (0.0, np.sum(w**2))
    for k in range(1, len(w) + 1):
        for support in combinations(np.abs(w), k):
            alpha = np.mean(support)
            error = np.sum(w**2) - k * alpha**2
            if error < best[1] - 1e-15:
                best = (alpha, error)
    return best


def ternary_by_sorting(w):
    """alpha: the mean of the k largest, k of the largest (sum)^2 / k."""
    size = np.sort(np.abs(w))[::-1]
    total = np.cumsum(size)
    k = np.argmax(total**2 / np.arange(1, len(w) + 1))
    return total[k] / (k + 1)


def alternate(w, bits, alpha, turns):
    """The scale after some turns of t = Q(w / alpha), alpha = <w, t> / <t, t>."""
    for _ in range(turns):
        t = np.clip(np.round(w / alpha), *bounds(bits))
        alpha = w @ t / (t @ t)
    return alpha


def expected(case):
    if case.is_weight:
        return Result(case.y, case.g, case.g)  # the gate is open: see OPTIONS; scales are compared in test_tsq
    y, top = sparse(case.x, case.s, case.bits, case.options["theta"])
    g = case.g * (case.x >= 0) * (case.x <= top)
    return Result(y, g, g)
