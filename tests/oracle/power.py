"""Sun et al. 2018: a signed power, then the straight-through estimator."""

from dataclasses import replace

import numpy as np

from tests.oracle import Result, ste

KINDS = ("channel", "group", "tensor", "static")  # ties of dynamic ranges lie elsewhere behind a power
OPTIONS = {"exponent": 0.75, "eps": 0.125}
NEUTRAL = {"exponent": 1.0}


def expected(case):
    if case.is_weight:
        return ste.expected(case)
    a, size = case.options["exponent"], np.abs(case.x)
    result = ste.expected(replace(case, x=np.sign(case.x) * size**a))
    slope = a * np.maximum(size, case.options["eps"]) ** (a - 1)
    return Result(result.y, result.x * slope, result.task)
