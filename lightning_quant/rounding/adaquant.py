"""AdaQuant: the weight itself moves, so that any level may be reached, and its rounded outputs are those in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.rounding.adaround import AdaRound
from lightning_quant.rounding.variables import MovedWeight, Variable


@dataclass(frozen=True)
class AdaQuant(AdaRound):
    """Layer by layer, ``min over V  ||W x - Q(W + V) x^||^2`` with the straight-through gradient.

    Source: Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021,
    arXiv:2006.10518, eq. 3.

    **Deviation**: ranges and biases stay as they are; V is in units of the scale, and the learning rate falls to 0.
    """

    variable: ClassVar[type[Variable]] = MovedWeight
    decays: ClassVar[bool] = True

    iterations: int = 300
    lr: float = 1e-3
