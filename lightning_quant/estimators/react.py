"""ReActNet: the sign of activations gets a learned threshold per channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain, unknown
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient
from lightning_quant.estimators.bireal import StraightWeights, quadratic, signs
from lightning_quant.estimators.ste import MASKS
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class React(Estimator):
    """ReActNet's RSign: activations are shifted by a learned number per channel before they are quantized.

    Activations: ``y = Q(x - shift)``, ``g_x = g * (2 - 4 |r|)`` inside the range (see ``bireal``),
    ``g_shift = -sum g_x`` over what shares a channel.  Weights: the clipped straight-through estimator.

    Args:
        mask: Where the weights' gradient ends (``ste``'s option).  The paper clips latent weights' gradients at
            +-1, which weights far below 1 do not reach: ``none`` comes near that.
        state_lr: Learning rate of the shifts as a factor on their layer's.

    Source: Liu et al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions",
    ECCV 2020, arXiv:2003.03488.
    Deviation: RPReLU is a layer of the network, not a quantizer, and no part of this; nor is the paper's
    distillation.  More than 1 bit and the learned scale (LSQ's gradient) in place of the levels +-1 are ours.
    """

    mask: str = "clamp"
    state_lr: float = 1.0
    about: ClassVar[About] = About("Liu et al. 2020", "2003.03488", "1-4", "scale, shift per input channel", "w1a1")
    learns_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(unknown("mask", self.mask, MASKS, "react.mask"))
        if self.state_lr < 0:
            raise ValueError(explain("react.state_lr", "a factor >= 0", self.state_lr, "1 is the layer's own rate."))

    def role(self, is_weight: bool) -> Estimator:
        """Only activations are shifted."""
        return StraightWeights(self.mask) if is_weight else self

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """See ``signs``."""
        return signs(spec)

    @property
    def needs_bins(self) -> bool:
        """Always."""
        return True

    def state(self, quantizer: FakeQuantizer) -> None:
        """Shifts, real, (channels,), from 0."""
        start = torch.zeros(quantizer.channels, dtype=quantizer.dtype, device=quantizer.device)
        quantizer.register_parameter("shift", nn.Parameter(start))

    def learned(self, quantizer: FakeQuantizer) -> Mapping[str, float]:
        """The shifts."""
        return {"shift": self.state_lr}

    def transform(self, quantizer: FakeQuantizer, x: Tensor) -> Tensor:
        """``x - shift``, in float32 or wider so that narrow inputs are rounded once."""
        after = x.ndim - 1 - quantizer.channel_axis % x.ndim
        return x.to(torch.promote_types(x.dtype, torch.float32)) - quantizer.shift.reshape(-1, *(1,) * after)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        assert bins is not None
        return quadratic(g, bins)

    def metrics(self, quantizer: FakeQuantizer) -> Mapping[str, Tensor]:
        """Mean magnitude of the shifts."""
        return {"shift": quantizer.shift.detach().float().abs().mean()}
