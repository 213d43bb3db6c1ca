"""Trained quantization thresholds: power-of-two scales, learned in the logarithm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.estimators.base import About, Estimator, demand
from lightning_quant.grid import Grid
from lightning_quant.scheme import TensorSpec


@dataclass(frozen=True)
class Tqt(Estimator):
    """Trained quantization thresholds (TQT): straight-through, with a learned power-of-two scale.

    ``s = 2^ceil(t) / 2^(b-1)``, t = log2 of the threshold, learned;
    ``g_x = g`` where round(x/s) is a code, 0 outside, i.e. up to half a step beyond the outermost levels;
    ``g_t = s ln 2 * sum g * (round(x/s) - x/s)`` there, with the lowest and the highest code for the bracket below
    and above.

    Source: Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point Inference of
    Deep Neural Networks", MLSys 2020, arXiv:1903.08066.
    Deviation: granularity and starting range are the scheme's and the observer's; no unsigned grids; t shares the
    model's optimizer, with its own learning-rate factor (``scale_lr``).
    """

    about: ClassVar[About] = About("Jain et al. 2020", "1903.08066", "2-8", "log2 of the threshold", "w8a8-static")
    learns_scale: ClassVar[bool] = True

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Static symmetric ranges held as a logarithm."""
        return demand(spec, where, "tqt", range="log2", symmetric=True, dynamic=False)

    def edges(self, grid: Grid) -> tuple[float, float]:
        """Half a step beyond the outermost levels."""
        return grid.low - 0.5, grid.high + 0.5
