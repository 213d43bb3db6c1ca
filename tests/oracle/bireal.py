"""Liu et al. 2018: derivative of 2x + x^2 below and 2x - x^2 above the middle of a bin of width 2."""

import numpy as np

from tests.oracle import Result, offset

BITS = (1, 2, 4, 1.58)


def slope(case, x):
    """In a bin mapped to [-1, 1]: 2 + 2v for v < 0, 2 - 2v for v >= 0."""
    v = 2 * offset(x, case.s, case.z, case.low, case.high)[1]
    return np.where(v < 0, 2 + 2 * v, 2 - 2 * v)


def expected(case):
    gx = case.g * case.mask * slope(case, case.x)
    return Result(case.y, gx, gx)
