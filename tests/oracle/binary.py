"""Courbariaux et al. 2016 and Rastegari et al. 2016: the sign, times the mean magnitude of a filter."""

import numpy as np

from tests.oracle import Result

BITS = (1,)
KINDS = ("channel", "token", "static")
ASYMMETRIC = False
UNMASKED = True  # by the term 1/n


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def filters(w):
    """(y, dy/dw) for rows of weights: XNOR-Net's section 3.1 and its gradient of the weights."""
    alpha = np.abs(w).mean(axis=1, keepdims=True)
    return alpha * sign(w), 1 / w.shape[1] + alpha * (np.abs(w) <= 1)


def expected(case):
    if case.is_weight:
        y, slope = (part.reshape(case.x.shape) for part in filters(case.blocks(case.x)))
    else:
        y, slope = case.s / 2 * sign(case.x), case.s / 2 * (np.abs(case.x) <= 1)
    return Result(y, case.g * slope, case.g * slope)
