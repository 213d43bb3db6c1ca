"""Faraone et al. 2018: y = alpha q; dL/dalpha = sum g q over the block, dL/dw = g."""

import numpy as np

from tests.oracle import Result

BITS = (1.58, 1)
KINDS = ("pixel", "channel", "group", "tensor")
ASYMMETRIC = False
UNMASKED = True


def codes(w, bits, eta, top):
    q = np.where(w >= 0, 1.0, -1.0)
    return q if bits == 1 else q * (np.abs(w) > eta * top)


def expected(case):
    """With one bit the scale is 2 alpha, whose gradient is half of alpha's."""
    q = codes(case.x, case.bits, case.options["eta"], np.abs(case.x).max())
    per_scale = 0.5 if case.bits == 1 else 1.0
    return Result(case.s * per_scale * q, case.g, np.zeros_like(case.g), code=per_scale * q + case.z)
