"""Lee et al. 2021, eq. 5, with x_n and x_q normalised to [0, 1] over the whole range."""

import numpy as np

from tests.oracle import Result

OPTIONS = {"delta": 0.25}
NEUTRAL = {"delta": 0.0}


def expected(case):
    u = np.clip(case.x / case.s + case.z, case.low, case.high)
    width = case.high - case.low
    x_n, x_q = (u - case.low) / width, (np.round(u) - case.low) / width
    gx = case.g * (1 + case.options["delta"] * np.sign(case.g) * (x_n - x_q)) * case.mask
    return Result(case.y, gx, gx)
