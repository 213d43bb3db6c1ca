"""Training for integer arithmetic alone: min-max weights without the lowest code, inputs quantized after a delay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand
from lightning_quant.estimators.gated import Gated
from lightning_quant.grid import Grid
from lightning_quant.scheme import TensorSpec


@dataclass(frozen=True)
class Iao(Gated):
    """Integer-arithmetic-only training (IAO): min-max ranges, inputs float for a first part of the run.

    ``scale = (max - min) / (2^b - 1)``, ``zero = round(low - min / scale)``, so that 0 is a level; weights are
    symmetric, ``scale = max |w| / (2^(b-1) - 1)``, and never take the lowest code.  Input ranges are exponential
    averages of min and max, taken in all through the delay.  ``g_x = g`` inside the range, else 0; during the delay
    inputs are float in training and pass all of g.  ``lightning_quant.integer`` computes the result on integers.

    Args:
        input_delay: Share of the run, in [0, 1), before inputs are quantized in training (evaluation always does).

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, arXiv:1712.05877, sections 2 and 3.
    Deviation: weights are symmetric, with a scale per output channel, unless the scheme says ``-asym`` or
    ``-tensor``; input ranges stay once delay and ``calibration`` are over; the delay's default, as a share of the run,
    is ours; batch normalization is folded by ``batch_norm="two_pass"``, which any method takes.
    """

    about: ClassVar[About] = About("Jacob et al. 2018", "1712.05877", "2-8", "nothing", "w8a8")
    input_delay: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.input_delay < 1:
            raise ValueError(explain("iao.input_delay", "a share of the run in [0, 1)", self.input_delay, "Use 0.1."))

    def role(self, is_weight: bool) -> Estimator:
        """Weights are quantized from the start."""
        return IaoWeight() if is_weight else self

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Static, asymmetric, observed."""
        needs = {"grid": "int", "range": "scale", "dynamic": False, "learn_scale": False}
        return demand(spec, where, "iao", **needs, symmetric=(False, True), observer=("ema", "minmax"))

    def calibration(self, total: int | None) -> int:
        """The delay."""
        return math.ceil(self.input_delay * (total or 0))

    @property
    def needs_bins(self) -> bool:
        """The range cuts gradients only behind the gate."""
        return True

    def edges(self, grid: Grid) -> tuple[float, float]:
        """``gradient`` cuts."""
        return -math.inf, math.inf

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        assert bins is not None
        kept = (bins.raw == bins.u).logical_or_(inputs[0] < 0.5)
        g = g.where(kept, 0.0)
        return Gradient(g, g, (None,))


@dataclass(frozen=True)
class IaoWeight(Estimator):
    """The weights of ``iao``: straight-through on min-max ranges that follow the weights."""

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Narrow, per channel."""
        needs = {"grid": "int", "range": "scale", "learn_scale": False, "observer": "minmax"}
        spec = demand(spec, where, "iao", **needs, dynamic=(True, False))
        granularity = "channel" if spec.granularity == "auto" else spec.granularity
        return replace(spec, narrow=True, granularity=granularity)
