"""Liu et al. 2020: activations through RSign, x - shift, with Bi-Real's slope; weights clipped straight-through."""

from dataclasses import replace

import numpy as np

from tests.oracle import Result
from tests.oracle.bireal import slope
from tests.oracle.ste import expected as straight

BITS = (1, 2, 4, 1.58)
STATE = {"shift": lambda shape: np.linspace(-0.4, 0.6, shape[0])}


def expected(case):
    if case.is_weight:
        return straight(case)
    moved = replace(case, x=case.x - case.state["shift"])
    gx = case.g * moved.mask * slope(case, moved.x)
    return Result(moved.y, gx, gx, {"shift": -gx}, mapped=moved.x)
