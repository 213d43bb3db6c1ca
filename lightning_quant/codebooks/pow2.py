"""Powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.codebooks.base import Codebook


@dataclass(frozen=True)
class Pow2(Codebook):
    """Zero and powers of two of either sign, at a scale that is one itself (INQ).

    ``{0, +-2^n2, .., +-2^n1}`` with ``n1 = floor(log2(4 absmax / 3))`` and ``n2 = n1 + 1 - 2^(b-2)``: the largest
    magnitude is below 3/2 of the top level.  Unsigned, the levels of the other sign make room for as many below.

    Source: Zhou et al., "Incremental Network Quantization", ICLR 2017, arXiv:1702.03044.
    Deviation: a value in the middle of two levels takes the one whose place, counted from 0, is even; the paper
    takes the larger one.
    """

    widths: ClassVar[tuple[float, ...]] = (2, 3, 4, 5, 6)
    covers: ClassVar[bool] = False

    def levels(self, bits: float, signed: bool) -> tuple[float, ...]:
        """In units of 2^n1."""
        count = 2 ** (int(bits) - 2) * (1 if signed else 2)
        positive = [2.0**-i for i in reversed(range(count))]
        return (*(-v for v in reversed(positive)), 0.0, *positive) if signed else (0.0, *positive)

    def scale(self, absmax: Tensor, top: float) -> Tensor:
        """2^n1, exactly; 0 where ``absmax`` is 0."""
        _, exponent = torch.frexp(absmax * 4 / 3)
        return torch.where(absmax > 0, torch.ldexp(torch.ones_like(absmax), exponent - 1), absmax)
