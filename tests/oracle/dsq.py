"""Gong et al. 2019: slope of the tanh staircase; dL/dalpha with the bin index held fixed."""

import numpy as np

from tests.oracle import Result, offset

NEUTRAL = {"alpha": 0.9999}


def expected(case):
    _, r = offset(case.x, case.s, case.z, case.low, case.high)
    alpha = case.state["alpha"]
    stretch, k = 1 / (1 - alpha), np.log(2 / alpha - 1)
    sech2 = 1 / np.cosh(k * r) ** 2
    gx = case.g * case.mask * stretch * k / 2 * sech2
    d_alpha = case.s / 2 * (stretch**2 * np.tanh(k * r) - stretch * 2 * r / (alpha * (2 - alpha)) * sech2)
    soft = None
    if "lower" in case.state:  # two learned ends move with the soft staircase
        soft = np.clip(case.x / case.s + case.z, case.low, case.high) - r + stretch / 2 * np.tanh(k * r)
    return Result(case.y, gx, gx, {"alpha": case.g * case.mask * d_alpha}, soft)
