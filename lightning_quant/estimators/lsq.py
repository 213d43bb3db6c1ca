"""Learned step size: the straight-through estimator with a scale that is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_quant.errors import unknown
from lightning_quant.estimators.base import About, Estimator
from lightning_quant.scheme import TensorSpec

STARTS = ("mse", "lsq")


@dataclass(frozen=True)
class Lsq(Estimator):
    """Learned step size (LSQ): straight-through, with a scale that is trained.

    ``g_x = g`` inside the range, 0 outside;
    ``g_s = sum(g * t) / sqrt(N * high)`` with t = round(v/s) - v/s inside, low below, high above, and N the
    number of elements that share the scale (for activations: of one sample).

    Args:
        init: Where scales start: ``mse``, the least squared error (layer inputs: the smoothed extremes), or
            ``lsq``, the paper's ``2 mean|v| / sqrt(high)`` for weights and layer inputs, which are static
            then.  A spec's own ``observer`` goes before.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153, eqs. 2-3.
    Deviation: scales start from the least squared error unless ``init="lsq"``, and are kept positive by a floor
    after each step.
    """

    about: ClassVar[About] = About("Esser et al. 2020", "1902.08153", "2-8", "scale")
    learns_scale: ClassVar[bool] = True
    init: str = "mse"

    def __post_init__(self) -> None:
        if self.init not in STARTS:
            raise ValueError(unknown("start", self.init, STARTS, "lsq.init"))

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """The observer that ``init`` names."""
        static = spec.dynamic is not True and (is_weight or spec.granularity in ("auto", "tensor"))
        if self.init != "lsq" or spec.observer is not None or not static:
            return spec
        return replace(spec, observer="lsq_init", dynamic=False)
