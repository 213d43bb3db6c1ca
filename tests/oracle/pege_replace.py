"""Random replacement: x~ = x + m (Q(x) - x), with lam * (m (x - Q(x)))^2 added to the loss."""

import numpy as np

from tests.oracle import Result, uniform

OPTIONS = {"share": 0.5, "lam": 2.0**-3}
NEUTRAL = {"share": 1.0, "lam": 0.0}
SOFT = True


def expected(case):
    m = (uniform(case.x.shape, case.step, case.salt) < case.schedules["share"]).astype(float)
    error = np.clip(case.x / case.s + case.z, case.low, case.high) * case.s
    error = error - np.round(error / case.s) * case.s
    gx = case.g * case.mask + 2 * case.pull * m * error
    return Result(np.where(m == 1, case.y, case.x), gx, case.g * case.mask)
