"""Element-wise gradient scaling: gradients grow or shrink by the sign of the rounding error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient


@dataclass(frozen=True)
class Ewgs(Estimator):
    """Element-wise gradient scaling (EWGS) with a fixed delta.

    ``g_x = g * (1 + delta * sign(g) * (x_n - x_q))`` inside the range, where x_n - x_q is the rounding error
    as a share of the whole range, (u - code) / (high - low).

    Args:
        delta: Strength, >= 0; 0 is the straight-through estimator.

    Source: Lee, Kim, Ham, "Network Quantization with Element-wise Gradient Scaling", CVPR 2021,
    arXiv:2104.00903, eq. 5.
    Deviation: the scale is learned with LSQ's gradient on a symmetric grid in place of two free bounds,
    and there is no output factor |alpha|.
    """

    about: ClassVar[About] = About("Lee, Kim, Ham 2021", "2104.00903", "1-8", "scale")
    drawn: ClassVar[tuple[Mapping[str, Any], ...]] = ({"delta": 0.0}, {"delta": 0.5}, {"delta": 1.0})
    delta: float = 1e-3
    learns_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.delta < 0:
            raise ValueError(explain("ewgs.delta", "a number >= 0", self.delta, "The authors use 1e-3."))

    @property
    def needs_bins(self) -> bool:
        """The rounding error is looked at unless delta is 0."""
        return self.delta != 0

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        if bins is None or self.delta == 0:
            return Gradient(g, g, ())
        share = self.delta / (bins.high - bins.low)
        g = torch.addcmul(g, bins.u - bins.code, g.abs(), value=share)
        return Gradient(g, g, ())
