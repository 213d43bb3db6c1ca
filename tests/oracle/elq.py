"""Zhou et al. 2018 on an even grid: free weights also feel beta * |g (Q(w) - w)| with g and Q(w) constant."""

import numpy as np

from tests.oracle import Result, ste

OPTIONS = {"beta": 0.25}
BITS = (4, 1.58, 1, 2, 8)
SOFT = True
UNMASKED = True
STATE = {"held": lambda shape: np.arange(np.prod(shape)).reshape(shape) % 3}


def expected(case):
    if not case.is_weight:
        return ste.expected(case)
    held = case.state["held"] != 0
    gx = case.g + case.options["beta"] * np.abs(case.g) * np.sign(case.x - case.y)
    gx = np.where(held, 0.0, gx)
    return Result(np.where(held, case.y, case.x), gx, gx)
