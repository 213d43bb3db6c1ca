"""NormalFloat: quantiles of the normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.codebooks.base import Codebook

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Nf4(Codebook):
    """NormalFloat of 4 bits, asymmetric around an exact 0, scaled by the largest magnitude of a block.

    Source: Dettmers et al., "QLoRA", NeurIPS 2023, arXiv:2305.14314; the constants are those of bitsandbytes.
    Deviation: block scales stay in the weights' dtype (no second quantization of the scales).
    """

    widths: ClassVar[tuple[float, ...]] = (4,)
    follows: ClassVar[bool] = True

    def levels(self, bits: float, signed: bool) -> tuple[float, ...]:
        """The 16 constants; the nonnegative 9 of them unsigned."""
        return LEVELS if signed else LEVELS[7:]
