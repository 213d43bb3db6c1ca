"""Liu et al. 2025: written in alpha, the range of the stretched grid, of which the scale is a share."""

import numpy as np

from tests.oracle import Result

BITS = (2, 1.58, 1, 3, 4, 8)
KINDS = ("channel", "group", "tensor", "static")
ASYMMETRIC = False


def expected(case):
    if not case.is_weight or case.bits > 2:
        g = case.g * case.mask
        return Result(case.y, g, g)
    n = {1: 0.5, 1.58: 1.5, 2: 2.0}[case.bits]
    shift = 0.5 if case.bits == 2 else 0.0
    alpha = case.s * n
    w = case.x / alpha
    if case.bits == 1:
        gx = case.g * (np.abs(w) <= 1)
        return Result(alpha * np.where(w < 0, -1.0, 1.0), gx, np.zeros_like(gx))
    y = alpha * (np.round(np.clip(w, -0.99, 0.99) * n - shift) + shift) / n
    gx = case.g * (np.abs(w) <= 0.99)
    return Result(y, gx, gx)
