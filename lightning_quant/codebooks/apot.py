"""Sums of powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from lightning_quant.codebooks.base import Codebook


def apot_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits magnitudes, ascending, the largest 1: see ``Apot``.

    >>> [round(10 * v, 4) for v in apot_levels(3)]
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0]
    """
    n, odd = divmod(bits, 2)
    terms = [[0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + odd)] for i in range(n)]
    if odd:
        terms.append([0.0, 2.0 ** -(2 * n)])
    sums = sorted(sum(choice) for choice in product(*terms))
    return tuple(v / sums[-1] for v in sums)


@dataclass(frozen=True)
class Apot(Codebook):
    """Additive powers of two (APoT) with two bits per term.

    m bits of magnitude (m = b - 1 with a sign, else b) make n = floor(m / 2) terms of two bits,
    ``p_i in {0, 2^-i, 2^-(i+n), 2^-(i+2n)}`` with i = 0 .. n-1; a level is the sum of one value per term, divided by
    the largest sum.  If m is odd there is one more term of one bit, ``{0, 2^-2n}``, and the last power of the others
    is 2^-(i+2n+1).  No power occurs twice, so that the 2^m sums differ.

    Source: Li, Dong, Wang, "Additive Powers-of-Two Quantization", ICLR 2020, arXiv:1909.13144, section 2.2.
    Deviation: weights are not normalized to mean 0 and variance 1 first; a gradient estimator of any method stands
    for the paper's straight-through one.
    """

    widths: ClassVar[tuple[float, ...]] = (2, 3, 4, 5, 6, 7, 8)

    def levels(self, bits: float, signed: bool) -> tuple[float, ...]:
        """Both signs and one zero, or magnitudes alone."""
        positive = apot_levels(int(bits) - 1 if signed else int(bits))
        return (*(-v for v in reversed(positive[1:])), *positive) if signed else positive
