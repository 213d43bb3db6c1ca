"""Learned step size: the straight-through estimator with a scale that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.estimators.base import About, Estimator


@dataclass(frozen=True)
class Lsq(Estimator):
    """Learned step size (LSQ): straight-through, with a scale that is trained.

    ``g_x = g`` inside the range, 0 outside;
    ``g_s = sum(g * t) / sqrt(N * high)`` with t = round(v/s) - v/s inside, low below, high above, and N the
    number of elements that share the scale (for activations: of one sample).

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, eqs. 2-3.
    Deviation: scales start from the least squared error instead of 2 mean|v|/sqrt(Q_P), and are kept
    positive by a floor after each step.
    """

    about: ClassVar[About] = About("Esser et al. 2020", "1902.08153", "2-8", "scale")
    learns_scale: ClassVar[bool] = True
