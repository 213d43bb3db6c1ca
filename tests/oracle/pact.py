"""Choi et al. 2018: inputs clipped to [0, alpha]; weights are DoReFa's.  The contract's case.s is alpha / (2^k - 1)."""

from tests.oracle import dorefa

OPTIONS = {"decay": 0.25}
BITS, KINDS, ASYMMETRIC, UNMASKED = dorefa.BITS, dorefa.KINDS, False, True
SYMMETRIC = None
expected = dorefa.expected


def inputs(x, alpha, k):
    """Eqs. 1 and 2, and the gradients of x and alpha for an incoming gradient of 1."""
    y = 0.5 * (abs(x) - abs(x - alpha) + alpha)
    step = alpha / (2**k - 1)
    return round(y / step) * step, float(0 < x < alpha), float(x >= alpha)
