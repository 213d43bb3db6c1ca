"""Two-step quantization: first sparse codes for the inputs under float weights, then the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.estimators.base import About, Estimator, demand
from lightning_quant.estimators.gated import Gated
from lightning_quant.estimators.half_normal import half_normal_levels
from lightning_quant.grid import Grid, code_bounds
from lightning_quant.scheme import TensorSpec

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Tsq(Estimator):
    """Two-step quantization (TSQ): sparse input codes first, weights second.

    Step one, inputs: 0 where x <= epsilon, else the nearest of 2^b - 1 levels; with sigma, the root mean square of
    the values that are not 0, epsilon is the theta-quantile of ``sigma |N(0, 1)|`` and the levels have the least
    squared error on what lies above (Lloyd-Max).  ``g_x = g`` between 0 and the last level, else 0.  Weights are
    float in training.

    Step two, from the share ``switch`` of the run on: weights are ``alpha * t``, t and a scale alpha per output
    channel by alternating least squares, ``min ||w - alpha t||^2``, exact for ternary t, at every forward;
    ``g_w = g``.

    Args:
        theta: Share of the positive inputs that becomes 0, in [0, 1).
        switch: Share of the run, in [0, 1), after which training computes with quantized weights.
        signed: Levels for negative inputs too: half as many for each sign.  Without it they become 0, which is right
            behind a ReLU alone.

    Source: Wang, Hu, Zhang, Zhang, Liu, Cheng, "Two-Step Quantization for Low-bit Neural Networks", CVPR 2018.
    Deviation: the paper's second step minimises the error of the layer's outputs on data; ours that of the weights,
    anew at every forward, while training goes on.  Sigma is measured on the inputs; the defaults of theta and switch,
    and signed levels, are ours.
    """

    about: ClassVar[About] = About("Wang et al. 2018", "", "1-8", "nothing", "w1.58a2")
    theta: float = 0.25
    switch: float = 0.5
    signed: bool = False

    def __post_init__(self) -> None:
        for name in ("theta", "switch"):
            if not 0 <= getattr(self, name) < 1:
                cure = "Use 0.25 and 0.5."
                raise ValueError(explain(f"tsq.{name}", "a share in [0, 1)", getattr(self, name), cure))

    def role(self, is_weight: bool) -> Estimator:
        """The two steps."""
        return TsqWeight(self.switch) if is_weight else TsqInput(self.theta, self.signed)


@dataclass(frozen=True)
class TsqWeight(Gated):
    """Step two of ``tsq``: float until the switch, then codes and scales of least squared error."""

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """Scales follow the weights."""
        needs = {"grid": "int", "range": "scale", "symmetric": True, "dynamic": True, "learn_scale": False}
        return demand(spec, where, "tsq", **needs, observer="als", granularity=("channel", "group", "tensor"))

    def edges(self, grid: Grid) -> tuple[float, float]:
        """Large weights lie beyond the outermost level and are trained all the same."""
        return -math.inf, math.inf


@dataclass(frozen=True)
class TsqInput(Estimator):
    """Step one of ``tsq``: see there."""

    theta: float = 0.25
    signed: bool = False
    _tops: tuple[float, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tops", tuple(self._table(bits)[1][-1] for bits in WIDTHS))

    def prefer(self, spec: TensorSpec, is_weight: bool, where: str) -> TensorSpec:
        """A static scale, the data's root mean square; at least one level beside 0 of each sign."""
        if spec.bits not in WIDTHS:
            cure = "Use for example a2 in the scheme."
            raise ValueError(explain(f"{where}: method 'tsq'", "2 to 8 bits", f"{spec.bits:g}", cure))
        needs = {"grid": "int", "range": "scale", "symmetric": True, "dynamic": False, "learn_scale": False}
        return demand(spec, where, "tsq", **needs, observer="rms", narrow=False)

    def _table(self, bits: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lower ends of the bins and levels, at sigma = 1 and for positive inputs."""
        low, high = code_bounds(bits)
        return half_normal_levels(high if self.signed else high - low, self.theta)

    def state(self, quantizer: FakeQuantizer) -> None:
        """Lower ends of the bins (-inf for code 0) and levels, (2, n) float64 in int64 words, as ``Grid.table``."""
        ends, levels = self._table(quantizer.spec.bits)
        table = torch.tensor([(-math.inf, *ends), (0.0, *levels)], dtype=torch.float64)
        words = table.view(torch.int64).to(quantizer.device)
        quantizer.register_buffer("levels", words, persistent=False)

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Lower ends of the bins, and levels, in units of the scale."""
        ends, levels = quantizer.levels.view(torch.float64).to(torch.promote_types(x.dtype, torch.float32))
        return ends[1:].contiguous(), levels

    def assign(self, u: Tensor, grid: Grid, inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        """How many bins begin below ``u``; signed: below its magnitude, with its sign."""
        place = torch.bucketize(u.abs() if self.signed else u, inputs[0]).to(u.dtype)
        return place.copysign_(u) if self.signed else place.add_(grid.low)

    def decode(self, code: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Levels in units of sigma."""
        levels = inputs[1]
        if self.signed:
            return levels[code.abs().long()].copysign_(code)
        return levels[(code + levels.shape[0] // 2).long()]

    def edges(self, grid: Grid) -> tuple[float, float]:
        """From 0, or its mirror image, to the last level."""
        top = self._tops[WIDTHS.index(int(grid.bits))]
        return (-top if self.signed else 0.0), top
