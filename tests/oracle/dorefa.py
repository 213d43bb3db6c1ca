"""Zhou et al. 2016, section 2: quantize_k on [0, 1], weights through a tanh, inputs clipped to the range."""

import numpy as np

from tests.oracle import Result, uniform

BITS = (2, 1, 3, 4, 8)
KINDS = ("tensor", "static")
ASYMMETRIC = False
SYMMETRIC = None
UNMASKED = True


def quantize_k(r, k):
    return np.round((2**k - 1) * r) / (2**k - 1)


def weights(w, k, end=1.0):
    """``end``: 1, as the dtype of the state holds it."""
    if k == 1:
        return np.abs(w).mean() * np.where(w >= 0, 1.0, -1.0)
    t = np.tanh(w)
    return end * (2 * quantize_k(t / (2 * np.abs(t).max() * end) + 0.5, k) - 1)


def weight_slope(w, k):
    return 1.0 if k == 1 else (1 - np.tanh(w) ** 2) / np.abs(np.tanh(w)).max()


def gradients(dr, k, step, salt):
    """f of the paper, the maximum over all axes but the first."""
    top = np.abs(dr).reshape(len(dr), -1).max(axis=1).reshape(-1, *(1,) * (dr.ndim - 1))
    noise = (uniform(dr.shape, step, salt) - 0.5) / (2**k - 1)
    return 2 * top * (quantize_k(dr / (2 * top) + 0.5 + noise, k) - 0.5)


def expected(case):
    if not case.is_weight:
        return Result(case.y, case.g * case.mask, case.g * case.mask)
    end = 1.0
    if case.bits > 1:
        end = case.s.max() * (2**case.bits - 1) / 2
        assert abs(end - 1) < 5e-3
    gx = case.g * weight_slope(case.x, case.bits)
    return Result(weights(case.x, case.bits, end), gx, gx)
