"""Straight-through: the rounding is the identity in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.estimators.base import About, Estimator


@dataclass(frozen=True)
class Ste(Estimator):
    """Clipped straight-through estimator.

    ``g_x = g`` where low <= x/scale + zero <= high, else 0 (the mask looks at the value before rounding,
    so it ends at the outermost level; torch's fake_quantize passes half a step more).

    Source: Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons",
    arXiv:1308.3432; the clipped form as in Courbariaux et al., arXiv:1602.02830.
    """

    about: ClassVar[About] = About("Bengio, Leonard, Courville 2013", "1308.3432", "2-8", "nothing")
