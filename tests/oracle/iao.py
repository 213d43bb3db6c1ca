"""Jacob et al. 2018: clipped straight-through; inputs are float, with all of their gradient, before the gate opens."""

import numpy as np

from tests.oracle import Result, ste

OPTIONS = {"input_delay": 0.3}
UNMASKED = True  # the range of weights follows them: none lies beyond it
KINDS = ("channel", "group", "tensor", "static")


def expected(case):
    if case.is_weight or case.schedules["gate"] >= 0.5:
        return ste.expected(case)
    return Result(case.x, case.g, np.zeros_like(case.g))
