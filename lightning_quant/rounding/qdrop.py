"""QDrop: BRECQ's reconstruction with the rounding of activations left out at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.rounding.brecq import Brecq


@dataclass(frozen=True)
class QDrop(Brecq):
    """Block by block; half of the numbers that the block and its layers read are those of the float model.

    A flatter minimum: codes that are right for rounded and for exact inputs.

    Source: Wei et al., "QDrop", ICLR 2022, arXiv:2203.05740, eq. 8.

    **Deviation**: as ``AdaRound``; ranges of activations stay as calibrated.
    """

    drop: ClassVar[float] = 0.5
