"""Fan et al. 2020: random blocks of weights are quantized; Defossez et al. 2021: half a step of uniform noise."""

import numpy as np

from tests.oracle import Result, uniform

OPTIONS = {"rate": 0.5, "block": 3}
NEUTRAL = {"rate": 1.0}
SOFT = True


def expected(case):
    gx = case.g * case.mask
    if not case.is_weight:
        return Result(case.y, gx, gx)
    if "rate" in case.options:
        out, n = case.x.shape
        size = case.options["block"]
        blocks = -(-n // size)
        chosen = uniform((out, blocks), case.step, case.salt) < case.schedules["rate"]
        y = case.x.copy()
        for row in range(out):
            for i in range(n):
                if chosen[row, i // size]:
                    y[row, i] = case.y[row, i]
        return Result(y, gx, gx)
    code = case.x / case.s + case.z + uniform(case.x.shape, case.step, case.salt) - 0.5
    code = np.clip(code, case.low, case.high)
    return Result((code - case.z) * case.s, gx, gx, code=code)
