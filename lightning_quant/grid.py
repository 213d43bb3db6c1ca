"""What codes stand for: pure functions between real values and integer codes, and ``Grid``, which bundles them.

``code = clamp(round(x / scale + zero), low, high)`` and ``x = (code - zero) * scale``; rounding is half to
even.  A *code* is a float tensor that holds integers, so that no pass over memory is spent on casts.  On a
codebook a code is the place of its level, ``x = levels[code] * scale``, and between two levels places are
interpolated linearly, so that every estimator sees bins of width 1 there too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_quant.codebooks import CODEBOOKS
from lightning_quant.errors import explain, unknown
from lightning_quant.scales import SCALE_FORMATS

UNIFORM = ("int", "midrise")


def code_bounds(bits: float) -> tuple[int, int]:
    """Lowest and highest code: signed two's complement, {-1, 0, 1} for 1.58 bits, {-1, 0} for one bit.

    >>> code_bounds(4), code_bounds(1.58), code_bounds(1)
    ((-8, 7), (-1, 1), (-1, 0))
    """
    if bits == 1.58:
        return (-1, 1)
    half = 2 ** (int(bits) - 1)
    return (-half, half - 1)


def fixed_zero(bits: float) -> float:
    """Zero point of a symmetric grid, in codes: -0.5 for one bit (levels +-scale/2), else 0."""
    return -0.5 if bits == 1 else 0.0


def symmetric_scale(absmax: Tensor, bits: float) -> Tensor:
    """Scale whose highest level is ``absmax`` (one bit: whose two levels are +-absmax).

    Args:
        absmax: Largest magnitudes, real, any shape, >= 0.
        bits: Width of a code.

    Returns:
        Scales, real, same shape; 1 where ``absmax`` is 0, so that a tensor of zeros stays one.
    """
    high = code_bounds(bits)[1] - fixed_zero(bits)
    scale = absmax / high
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def reader_scale(absmax: Tensor, bits: float) -> Tensor:
    """Dynamic scale as compressed-tensors' reader in transformers computes it: absmax / ((2^b - 1) / 2)."""
    scale = absmax / ((2 ** int(bits) - 1) / 2)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def affine_scale(low: Tensor, high: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of the grid over [low, high], widened to hold 0.

    Args:
        low: Lower ends of the ranges, real.
        high: Upper ends, same shape.
        bits: Width of a code.

    Returns:
        (scale, zero): real, and integers in code units held in floats.
    """
    first, last = code_bounds(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (last - first)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.clamp(torch.round(first - low / scale), first, last)
    return scale, zero


def scale_and_zero(low: Tensor, high: Tensor, bits: float, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point unless the grid's is fixed, for a range [low, high]."""
    if symmetric:
        return symmetric_scale(torch.maximum(-low, high).clamp(min=0), bits), None
    return affine_scale(low, high, bits)


def encode(x: Tensor, scale: Tensor, zero: Tensor | float, low: int, high: int) -> Tensor:
    """Real values to codes; ``scale`` and ``zero`` broadcast against ``x``.

    >>> encode(torch.tensor([0.26, -9.0]), torch.tensor([0.25]), 0.0, -2, 1)
    tensor([ 1., -2.])
    """
    u = torch.div(x, scale)
    if isinstance(zero, Tensor) or zero:
        u = u + zero
    return torch.round_(u).clamp_(low, high) if not u.requires_grad else torch.round(u).clamp(low, high)


def decode(code: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
    """Codes to real values."""
    if isinstance(zero, Tensor) or zero:
        code = code - zero
    return code * scale


@dataclass(frozen=True)
class Grid:
    """The codes of one quantizer.

    Args:
        bits: Width of a code.
        symmetric: Zero point fixed; for codebooks: negative levels exist.
        kind: ``int`` (two's complement), ``midrise`` (the same codes half a step further up: no level at 0,
            as in DoReFa and SEQ), or a name of ``CODEBOOKS``.
        scale_format: Name of ``SCALE_FORMATS``.
        narrow: Leave out the most negative code, so that the grid is its own mirror image.

    Attributes:
        low: Lowest code.
        high: Highest code.
        zero: Fixed zero point in codes, or None where the range's own applies.
        levels: Real levels at scale 1 in ascending order, or None on a uniform grid.
        top: Largest level at scale 1.
    """

    bits: float
    symmetric: bool = True
    kind: str = "int"
    scale_format: str = "float"
    narrow: bool = False
    low: int = field(init=False, default=0)
    high: int = field(init=False, default=0)
    zero: float | None = field(init=False, default=None)
    levels: tuple[float, ...] | None = field(init=False, default=None)
    top: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.kind not in (*UNIFORM, *CODEBOOKS):
            raise ValueError(unknown("grid", self.kind, (*UNIFORM, *CODEBOOKS), "TensorSpec.grid"))
        if self.scale_format not in SCALE_FORMATS:
            raise ValueError(unknown("format", self.scale_format, SCALE_FORMATS, "TensorSpec.scale_format"))
        if self.kind in UNIFORM:
            low, high = code_bounds(self.bits)
            zero: float | None = fixed_zero(self.bits) if self.symmetric else None
            if self.kind == "midrise":
                if not self.symmetric or self.bits == 1.58:
                    got = f"{self.bits:g} bits, symmetric={self.symmetric}"
                    raise ValueError(
                        explain("TensorSpec.grid='midrise'", "a symmetric grid of 2^b levels", got, "Use int.")
                    )
                zero = -0.5
            if self.narrow and self.symmetric and zero == 0 and low < -1:
                low += 1
            top = high - (zero or 0.0)
        else:
            CODEBOOKS[self.kind].check(self.bits, f"TensorSpec.grid={self.kind!r}")
            levels = CODEBOOKS[self.kind].levels(self.bits, self.symmetric)
            low, high, zero, top = 0, len(levels) - 1, 0.0, levels[-1]
            object.__setattr__(self, "levels", levels)
        for name, value in (("low", low), ("high", high), ("zero", zero), ("top", top)):
            object.__setattr__(self, name, value)

    @property
    def covers(self) -> bool:
        """Whether a scale set by the largest magnitude puts all data between the outermost levels."""
        return self.scale_format in ("float", "pow2") and (self.kind in UNIFORM or CODEBOOKS[self.kind].covers)

    def scale(self, absmax: Tensor) -> Tensor:
        """Scale, real, whose top level is ``absmax`` (>= 0), in the grid's format; 1 where ``absmax`` is 0."""
        scale = absmax / self.top if self.levels is None else CODEBOOKS[self.kind].scale(absmax, self.top)
        scale = self.format(scale)
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def format(self, scale: Tensor) -> Tensor:
        """A scale rounded to the format scales are stored in."""
        rounder = SCALE_FORMATS[self.scale_format]
        return scale if rounder is None else rounder(scale, self.top)

    def scale_and_zero(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale, and zero point unless it is fixed, for a range [low, high], real."""
        if self.zero is None:
            scale, zero = affine_scale(low, high, self.bits)
            return self.format(scale), zero
        return self.scale(torch.maximum(-low, high).clamp(min=0)), None

    def table(self) -> Tensor | None:
        """Levels and the thresholds below them as (2, n) float64, in int64 words; None on a uniform grid.

        Held as words because casting a model to another dtype must leave a codebook alone.  A value on a
        threshold takes the level with the even place, counted from the level 0.
        """
        if self.levels is None:
            return None
        levels = torch.tensor(self.levels, dtype=torch.float64)
        first = int(levels.abs().argmin())
        middle = ((levels[1:] + levels[:-1]) / 2).float()
        up = (torch.arange(1, len(levels)) - first) % 2 == 0
        middle = torch.where(up, torch.nextafter(middle, torch.full_like(middle, -torch.inf)), middle)
        thresholds = torch.cat([torch.tensor([-torch.inf]), middle]).double()
        return torch.stack([levels, thresholds]).view(torch.int64)

    def nearest(self, u: Tensor, table: Tensor) -> Tensor:
        """Places, float, of the levels nearest to ``u``, which is in units of the scale."""
        thresholds = table.view(torch.float64)[1, 1:].to(u.dtype)
        return torch.bucketize(u.contiguous(), thresholds).to(u.dtype)

    def round(self, u: Tensor, table: Tensor) -> Tensor:
        """The level nearest to ``u``, in units of the scale."""
        return self.dequantize(self.nearest(u, table), table)

    def place(self, u: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Interpolated places of ``u`` clamped to the levels, and the distance of the levels around it."""
        levels = table.view(torch.float64)[0].to(u.dtype)
        u = u.clamp(self.levels[0], self.levels[-1])  # type: ignore[index]
        below = torch.bucketize(u.contiguous(), levels[1:-1], right=True)
        start = levels[below]
        width = levels[below + 1] - start
        return (u - start) / width + below, width

    def dequantize(self, code: Tensor, table: Tensor | None) -> Tensor:
        """Codes, float, in units of the scale and before the zero point: themselves on a uniform grid."""
        if table is None:
            return code
        return table.view(torch.float64)[0].to(code.dtype)[code.long()]

    def level(self, place: Tensor, table: Tensor) -> Tensor:
        """Interpolated levels at places: the inverse of ``place``."""
        levels = table.view(torch.float64)[0].to(place.dtype)
        below = place.floor().clamp_(self.low, self.high - 1).long()
        start = levels[below]
        return start + (place - below) * (levels[below + 1] - start)

    def span(self, edges: tuple[float, float] | None = None) -> tuple[float, float]:
        """Ends of the range in units of the scale, zero point included."""
        if edges is not None:
            return edges
        return (float(self.low), float(self.high)) if self.levels is None else (self.levels[0], self.levels[-1])


def beyond(edge: float, eps: float, tiny: float) -> float:
    """The next larger number in a dtype of this resolution (for a negative one at most two numbers on)."""
    if edge == 0 or math.isinf(edge):
        return edge + tiny
    return edge + eps * 2.0 ** (math.frexp(edge)[1] - 1)
