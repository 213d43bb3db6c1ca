"""LSQ+: learned steps for weights, learned steps and offsets for layer inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_quant.estimators.base import About, Estimator, demand
from lightning_quant.scheme import TensorSpec


@dataclass(frozen=True)
class LsqPlus(Estimator):
    """LSQ+: straight-through, with learned steps and, for layer inputs, a learned offset.

    Weights: ``y = s * clip(round(w / s), -2^(b-1), 2^(b-1) - 1)``, from
    ``s = max(|mean - 3 std|, |mean + 3 std|) / 2^(b-1)`` on.
    Layer inputs: ``y = s * clip(round((x - beta) / s), 0, 2^b - 1) + beta``, beta real, from the least squared
    error on.  ``g_s`` as in LSQ; ``g_beta`` = sum of g over the values outside the range; both times
    ``1 / sqrt(N * highest code)``.

    Source: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization", CVPRW 2020, arXiv:2004.09576.
    Deviation: the least squared error is searched for in every step of the calibration and averaged with decay
    0.9.  A real offset leaves no exact 0 and integer runtimes have no place for it: exports keep weights only.
    """

    about: ClassVar[About] = About("Bhalgat et al. 2020", "2004.09576", "2-8", "scale, offset", "w4a4")
    learns_scale: ClassVar[bool] = True

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """A symmetric scale for weights, step and offset for layer inputs; neither dynamic."""
        if is_weight:
            spec = demand(spec, where, "lsq_plus", symmetric=True, range="scale", dynamic=False)
            return replace(spec, observer=spec.observer or "three_sigma")
        spec = demand(spec, where, "lsq_plus", range="offset", dynamic=False)
        return replace(spec, observer=spec.observer or "mse_ends")
