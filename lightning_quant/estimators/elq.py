"""Explicit loss-error-aware quantization: incremental freezing, with a pull towards levels the loss does not mind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Gradient, demand
from lightning_quant.estimators.incremental import Incremental
from lightning_quant.scheme import TensorSpec


@dataclass(frozen=True)
class Elq(Incremental):
    """Explicit loss-error-aware quantization (ELQ) for few levels.

    Weights are frozen by magnitude as in ``inq``.  The free ones are float and have, besides the task loss, the
    first-order change of the loss that rounding them will cause, ``beta * sum |g * (Q(w) - w)|``, with g and Q(w)
    held constant: ``g_w = g + beta * |g| * sign(w - Q(w))``.

    Args:
        beta: Strength of that term, >= 0; 0 leaves incremental freezing alone.
        share: Share that is frozen, in [0, 1] of a weight tensor's elements: a number, or the fields of a
            ``Schedule``.  It has to reach 1 before the run ends.

    Source: Zhou, Yao, Wang, Chen, "Explicit Loss-Error-Aware Quantization for Low-Bit Deep Neural Networks",
    CVPR 2018.
    Deviation: the absolute value per element (a sum over a layer would let errors cancel) and the schedule of the
    share are our reading; g is that of one backward pass on one rank; scales have the least squared error at the
    start and stay.
    """

    about: ClassVar[About] = About("Zhou, Yao, Wang, Chen 2018", "", "1-8", "nothing", "w1.58a16")
    beta: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(explain("elq.beta", "a number >= 0", self.beta, "Use 0.05."))

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Evenly spaced levels."""
        return super().prefer(demand(spec, where, "elq", grid=("int", "midrise")), is_weight, where)

    @property
    def needs_bins(self) -> bool:
        """The sign of the rounding error is looked at unless beta is 0."""
        return self.beta != 0

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class; the sign is that of the unclamped error, so that weights beyond the range are pulled too."""
        if bins is not None and self.beta != 0:
            g = torch.addcmul(g, g.abs(), (bins.raw - bins.code).sign_(), value=self.beta)
        return super().gradient(g, bins, inputs)
