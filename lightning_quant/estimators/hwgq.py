"""HWGQ: inputs on the levels that suit the positive half of a normal distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import unknown
from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand
from lightning_quant.estimators.binary import BinaryWeights
from lightning_quant.grid import Grid
from lightning_quant.observers.half_gauss import STEPS
from lightning_quant.scheme import TensorSpec

BACKWARDS = ("clipped", "vanilla", "log")
SPREADS = ("measured", "unit")


@dataclass(frozen=True)
class Hwgq(Estimator):
    """Half-wave Gaussian quantization (HWGQ) of inputs; weights are binary or those of ``ste``.

    See the classes of weights and inputs for their formulas.

    Args:
        backward: Slope for inputs above the largest level q_m: ``clipped``: 0; ``vanilla``: 1; ``log``:
            1 / (x - tau).
        spread: sigma: ``measured``: the rms of positive inputs, averaged over steps; ``unit``: 1, for inputs
            normalised to variance 1.

    Source: Cai et al., "Deep Learning with Low Precision by Half-wave Gaussian Quantization", CVPR 2017,
    arXiv:1702.00953, section 4.
    Deviation: sigma is measured by default, where the paper relies on batch normalization for sigma = 1.
    """

    about: ClassVar[About] = About("Cai et al. 2017", "1702.00953", "1-8", "nothing", "w1a2")
    drawn: ClassVar[tuple[dict[str, str], ...]] = tuple({"backward": name} for name in BACKWARDS)
    backward: str = "clipped"
    spread: str = "measured"

    def __post_init__(self) -> None:
        for name, known in (("backward", BACKWARDS), ("spread", SPREADS)):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), known, f"hwgq.{name}"))

    def role(self, is_weight: bool) -> Estimator:
        """The method is one of inputs."""
        return HwgqWeights() if is_weight else HwgqInputs(self.backward, self.spread)


@dataclass(frozen=True)
class HwgqWeights(BinaryWeights):
    """Weights: those of ``binary`` with alpha="filter" for one bit, those of ``ste`` for more."""

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Only one bit asks for anything."""
        return super().prefer(spec, is_weight, where) if spec.bits == 1 else spec


@dataclass(frozen=True)
class HwgqInputs(Estimator):
    """Inputs: 0 for x <= 0, else the nearest of {q, 2q, ..., (2^b - 1) q}: no positive x becomes 0.

    q = sigma times the step with the least squared error on the positive half of a normal distribution (0.539 for
    2 bits).  ``g_x = 0`` for x <= 0, ``g`` up to q_m = (2^b - 1) q, and beyond it ``0`` (clipped ReLU), ``g``
    (ReLU) or ``g / (x - tau)``, tau = q_m - 1, x and q_m in units of sigma (log-tailed ReLU).
    """

    backward: str = "clipped"
    spread: str = "measured"

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """One static range per layer, from 0."""
        observer = "half_gauss_unit" if self.spread == "unit" else "half_gauss"
        needs = {"granularity": "tensor", "symmetric": False, "dynamic": False, "grid": "int", "range": "clip"}
        return demand(spec, where, "hwgq", **needs, observer=observer, learn_scale=False)

    @property
    def needs_bins(self) -> bool:
        """Codes tell positive inputs from the others."""
        return True

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """The nearest positive level where x > 0: the lowest code is 0."""
        return torch.where(u > grid.low, u.round().clamp(grid.low + 1, grid.high), float(grid.low))

    def edges(self, grid: Grid) -> tuple[float, float] | None:
        """Up to the largest level, or everywhere."""
        return None if self.backward == "clipped" else (-math.inf, math.inf)

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class."""
        assert bins is not None
        passed = (bins.code - bins.low).clamp_(max=1).mul_(g)
        if self.backward == "log":
            levels = bins.high - bins.low
            step = STEPS[levels.bit_length() - 1]
            passed = passed / (bins.raw - bins.high).clamp_(min=0).mul_(step).add_(1)
        return Gradient(passed, passed, ())
