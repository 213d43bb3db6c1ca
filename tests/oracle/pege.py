"""Hard forward, backward of y = F + stopgrad(Q - F) with lam * (F - Q)^2 added to the loss."""

import numpy as np

from tests.oracle import Result, code, offset

OPTIONS = {"lam": 2.0**-3, "sharpness": 4.0, "initial": 0.5}  # lam: exact in float32, in which it is held
NEUTRAL = {"lam": 0.0, "initial": 0.0}


def surrogate(x, s, z, low, high, b, k):
    """F in code units, dF/du and dF/db of the learned surrogate."""
    u, r = offset(x, s, z, low, high)
    top = np.tanh(k / 2)
    phi = np.tanh(k * r) / (2 * top)
    slope = k / np.cosh(k * r) ** 2 / (2 * top)
    return u + b * (phi - r), 1 + b * (slope - 1), phi - r


def turn(r, b, k):
    """dF/dk."""
    top, sech2 = np.tanh(k / 2), 1 / np.cosh(k * r) ** 2
    return b * (r * sech2 * top - 0.5 * np.tanh(k * r) / np.cosh(k / 2) ** 2) / (2 * top**2)


def expected(case):
    grid = (case.x, case.s, case.z, case.low, case.high)
    learned = "sharpness" in case.state
    k = case.state["sharpness"] if learned else case.schedules["sharpness"]
    f, d, gap = surrogate(*grid, case.state["theta"], k)
    error = case.s * (f - code(*grid))
    total = (case.g + 2 * case.pull * error) * case.mask
    state = {"theta": case.s * total * gap}
    if learned:
        _, r = offset(*grid)
        state["sharpness"] = case.s * total * turn(r, case.state["theta"], k)
    return Result(case.y, total * d, case.g * case.mask * d, state)
