"""Stretched elastic quantization: all levels of very few bits used evenly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_quant.estimators.base import About, Bins, Estimator, Gradient, demand
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.grid import Grid
from lightning_quant.scheme import TensorSpec

CLIP = 0.99
LEVELS = {1.58: 1.5, 2: 2.0}  # n: levels per alpha


@dataclass(frozen=True)
class Seq(Estimator):
    """Stretched elastic quantization (SEQ) of weights, the quantizers of ParetoQ by width.

    * 2 bits: ``y = alpha (round(2 w/alpha - 1/2) + 1/2) / 2``: levels +-alpha/4 and +-3/4 alpha;
    * 1.58 bits: ``y = alpha round(1.5 w/alpha) / 1.5``: levels 0 and +-2/3 alpha;
    * 1 bit: ``y = alpha sgn(w)``, sgn(0) = 1;
    * 3 to 8 bits: as LSQ.

    1.58 and 2 bits: ``g_w = g`` where |w/alpha| <= 0.99, which is beyond the outermost levels, 0 outside;
    ``dy/dalpha = (y - w) / alpha`` inside, the outermost level over alpha outside.  1 bit: ``g_w = g`` where
    |w| <= alpha, ``dy/dalpha = sgn(w)``.  The scale held is the distance s of two levels (alpha/1.5, alpha/2,
    2 alpha); g_s is multiplied by ``1 / sqrt(N * max(high, 1))`` with N the elements of the row.
    alpha starts at max|w| (1 bit: mean|w|), s of 3 bits and more at max|w| / high.

    Source: Liu et al., "ParetoQ: Scaling Laws in Extremely Low-bit LLM Quantization", 2025, arXiv:2502.02631.
    Deviation: s is learned in place of alpha, and N counts a row in place of the whole tensor, which only scales
    its learning rate; at 1.58 bits the authors' code has +-1 for dy/dalpha outside, where +-2/3 is the derivative.
    Layer inputs, if quantized, are those of LSQ.
    """

    about: ClassVar[About] = About("Liu et al. 2025", "2502.02631", "1-4", "scale", "w2a16-channel")
    learns_scale: ClassVar[bool] = True

    def role(self, is_weight: bool) -> Estimator:
        """LSQ for layer inputs."""
        return self if is_weight else Lsq()

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """One learned scale per row; two bits have no level at 0."""
        grid = "midrise" if spec.bits == 2 else "int"
        spec = demand(spec, where, "seq", grid=grid, range="scale", symmetric=True, dynamic=False)
        granularity = "channel" if spec.granularity == "auto" else spec.granularity
        return replace(spec, granularity=granularity, observer=spec.observer or "seq_init")

    def edges(self, grid: Grid) -> tuple[float, float] | None:
        """0.99 alpha to either side at 1.58 and 2 bits."""
        if grid.bits not in LEVELS or grid.zero is None:
            return None
        reach = CLIP * LEVELS[grid.bits]
        return grid.zero - reach, grid.zero + reach

    def gradient(self, g: Tensor, bins: Bins | None, inputs: tuple[Tensor, ...]) -> Gradient:
        """See the class; without ``bins`` no scale is learned."""
        one_bit = bins is not None and bins.high == 0
        return Gradient(g, torch.zeros_like(g) if one_bit else g, ())
