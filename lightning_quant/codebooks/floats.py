"""Small floating-point numbers: E4M3, E5M2 and E2M1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.codebooks.base import Codebook


def float_levels(exponent: int, mantissa: int, bias: int, largest: float) -> tuple[float, ...]:
    """Nonnegative values of a format with subnormals, up to ``largest``, ascending.

    >>> float_levels(2, 1, 1, 6.0)
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    steps = 2**mantissa
    subnormal = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    normal = [(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, 2**exponent) for m in range(steps)]
    return tuple(v for v in subnormal + normal if v <= largest)


@dataclass(frozen=True)
class SmallFloat(Codebook):
    """Finite values of a small floating-point format; rounding is to nearest, ties to the even mantissa.

    Args:
        exponent: Exponent bits.
        mantissa: Mantissa bits.
        bias: Exponent bias.
        largest: Largest finite value.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433 (E4M3, E5M2); OCP
    Microscaling Formats specification v1.0 (E2M1).
    Deviation: the sign of zero is not kept.
    """

    exponent: int = 4
    mantissa: int = 3
    bias: int = 7
    largest: float = 448.0
    widths: ClassVar[tuple[float, ...]] = (8,)
    follows: ClassVar[bool] = True

    def levels(self, bits: float, signed: bool) -> tuple[float, ...]:
        """All finite values, with one zero."""
        positive = float_levels(self.exponent, self.mantissa, self.bias, self.largest)
        return (*(-v for v in reversed(positive[1:])), *positive) if signed else positive


@dataclass(frozen=True)
class Float4(SmallFloat):
    """E2M1, the element of MXFP4 and NVFP4."""

    exponent: int = 2
    mantissa: int = 1
    bias: int = 1
    largest: float = 6.0
    widths: ClassVar[tuple[float, ...]] = (4,)
