"""Li, Zhang, Liu 2016: threshold 0.7 E|w|, scale the mean magnitude above it."""

import numpy as np

from tests.oracle import Result

BITS = (1.58,)
KINDS = ("channel", "group", "tensor")
ASYMMETRIC = False
UNMASKED = True


def ternary(w):
    """(alpha, codes) of one block."""
    above = np.abs(w) > 0.7 * np.abs(w).mean()
    return np.abs(w)[above].mean(), np.sign(w) * above


def expected(case):
    rows = [alpha * codes for alpha, codes in map(ternary, case.blocks(case.x))]
    return Result(np.array(rows).reshape(case.x.shape), case.g, case.g)
