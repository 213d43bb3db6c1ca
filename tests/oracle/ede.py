"""Qin et al. 2020: k t (1 - tanh^2(t v)) around the middle of a bin of width 2, over standardised weights."""

from dataclasses import replace

import numpy as np

from tests.oracle import Result

OPTIONS = {"t": 1.5, "balance": False}  # balanced weights know no infinite element: their tests are their own
BITS = (1, 1.58, 2, 4)
UNMASKED = True


def slope(t, v):
    return max(1 / t, 1) * t * (1 - np.tanh(t * v) ** 2)


def standardise(w):
    """Rows with mean 0 and variance 1, and the function that carries gradients back through it."""
    n = w.shape[1]
    mean = w.sum(axis=1, keepdims=True) / n
    std = np.sqrt(((w - mean) ** 2).sum(axis=1, keepdims=True) / n)
    hat = (w - mean) / std

    def back(g):  # the Jacobian of one row: (1 - 11'/n - hat hat'/n) / std
        jacobian = np.eye(n) - 1 / n - hat[:, :, None] * hat[:, None, :] / n
        return np.einsum("oij,oj->oi", jacobian, g) / std

    return hat, back


def expected(case):
    x, back = case.x, lambda g: g
    if case.is_weight and case.options["balance"]:
        x, back = standardise(x)
    u = x / case.s + case.z
    middle = np.clip(np.floor(u), case.low, case.high - 1) + 0.5  # beyond the range: of the last bin
    g = case.g * slope(case.schedules["t"], 2 * (u - middle))
    return Result(replace(case, x=x).y, back(g), g, mapped=x)
