"""The formulas once more, in float64 numpy, straight from the papers.  Imports nothing of the packages under test.

Arrays are float64; ``u = x / s + z`` in code units; ``low`` and ``high`` bound the codes; every function works
element by element on arrays that already broadcast.  ``np.round`` rounds half to even.

One module per method holds its ``expected(case) -> Result``; what most of them share is here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

# --- what the contract hands to a method's oracle, and what it wants back -------------------------------------------


@dataclass
class Case:
    """One quantizer's input and state as float64 arrays of the input's shape (what is shared is spread out)."""

    x: np.ndarray
    g: np.ndarray  # dL/dy
    s: np.ndarray  # scale
    z: np.ndarray  # zero point
    low: int
    high: int
    bits: float
    clips: bool  # False where the range always covers the data
    is_weight: bool
    step: int
    salt: int
    scale_shape: tuple[int, ...]
    offset: Any = 0.0  # what was subtracted from x, and is added to y
    options: dict[str, Any] = field(default_factory=dict)
    state: dict[str, np.ndarray] = field(default_factory=dict)
    schedules: dict[str, float] = field(default_factory=dict)

    @property
    def mask(self):
        """Clamp-first: 1 where the value before rounding lies on the range."""
        return inside(self.x, self.s, self.z, self.low, self.high) if self.clips else np.ones_like(self.x)

    @property
    def y(self):
        return quantize(self.x, self.s, self.z, self.low, self.high)

    @property
    def pull(self):
        """lam(t): the progressive term is a sum over weights and a mean over activations."""
        return self.schedules["lam"] / (1 if self.is_weight else self.x.size)

    def blocks(self, values):
        """Weights as (scales, elements that share one)."""
        return values.reshape(int(np.prod(self.scale_shape)), -1)


@dataclass
class Result:
    """y, dL/dx, the part D * g of it that feeds the scale, dL/dstate per element, what stands for the code.

    ``mapped`` is what the grid gets where the method maps x first; ``task`` is then the gradient of that.
    """

    y: np.ndarray
    x: np.ndarray
    task: np.ndarray
    state: dict[str, np.ndarray] = field(default_factory=dict)
    code: np.ndarray | None = None
    mapped: np.ndarray | None = None


# --- grid ---------------------------------------------------------------------------------------------------------


def bounds(bits):
    """Two's complement; 1.58 bits is {-1, 0, 1}; one bit is {-1, 0}."""
    if bits == 1.58:
        return -1, 1
    return -(2 ** (int(bits) - 1)), 2 ** (int(bits) - 1) - 1


def scale_symmetric(absmax, bits):
    """The highest level is absmax; the two levels of one bit are +-absmax; 1 for an all-zero range."""
    absmax = np.asarray(absmax, np.float64)
    half_step = 0.5 if bits == 1 else 0.0
    scale = absmax / (bounds(bits)[1] + half_step)
    return np.where(scale > 0, scale, 1.0)


def scale_affine(lo, hi, bits):
    """Scale and integer zero point of the grid over [lo, hi] widened to hold 0."""
    first, last = bounds(bits)
    lo, hi = np.minimum(np.asarray(lo, np.float64), 0), np.maximum(np.asarray(hi, np.float64), 0)
    scale = (hi - lo) / (last - first)
    scale = np.where(scale > 0, scale, 1.0)
    return scale, np.clip(np.round(first - lo / scale), first, last)


def code(x, s, z, low, high):
    return np.clip(np.round(x / s + z), low, high)


def quantize(x, s, z, low, high):
    return (code(x, s, z, low, high) - z) * s


def inside(x, s, z, low, high):
    """Clamp-first mask: 1 where the value before rounding lies on the range."""
    u = x / s + z
    return ((u >= low) & (u <= high)).astype(np.float64)


def offset(x, s, z, low, high):
    """(clipped u, place r in [-1/2, 1/2] between the two neighbouring levels)."""
    u = np.clip(x / s + z, low, high)
    i = np.minimum(np.floor(u), high - 1)
    return u, u - i - 0.5


def scale_terms(case, result):
    """Per-element terms of dL/ds: chain rule through s * (Q(x/s + z) - z) with the estimator's dQ/du."""
    u = (case.x if result.mapped is None else result.mapped) / case.s + case.z
    code = np.round(np.clip(u, case.low, case.high)) if result.code is None else result.code
    return case.g * (code - case.z) - result.task * (u - case.z)


def range_gradients(name, of_scale, of_offset, n, codes, scale):
    """dL/d of a range's parameters, given dL/d of scale and offset; n elements share one scale."""
    low, high = codes
    steps = high - low
    return {
        "scale": {"scale": of_scale / np.sqrt(n * max(high, 1))},
        "plain": {"scale": of_scale},
        "offset": {"scale": of_scale / np.sqrt(n * steps), "offset": of_offset / np.sqrt(n * steps)},
        "bounds": {"upper": of_scale / steps, "lower": of_offset - of_scale / steps},
        "log2": {"log2_threshold": of_scale * scale * np.log(2)},
    }.get(name, {})


# --- noise --------------------------------------------------------------------------------------------------------


def lowbias32(counter):
    """Wellons' 32-bit finalizer on Python integers."""
    h = counter & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def uniform(shape, step, salt):
    base = step * 0x9E3779B1 + (salt & 0xFFFFFFFF) * 0x85EBCA77
    values = [(lowbias32(i + base) >> 8) * 2.0**-24 for i in range(int(np.prod(shape)))]
    return np.array(values).reshape(shape)


# --- schedules ----------------------------------------------------------------------------------------------------


def replacement_share(tau, p0, base=10.0):
    """log_B( B^p0 + (B - B^p0) t / T )."""
    return np.log(base**p0 + (base - base**p0) * tau) / np.log(base)


# --- ranges -------------------------------------------------------------------------------------------------------


def best_shrink(row, bits, symmetric, factors):
    """Brute force: the factor c whose grid over c * [min, max] has the least squared error."""
    low, high = bounds(bits)
    errors = []
    for c in factors:
        lo, hi = c * row.min(), c * row.max()
        if symmetric:
            s, z = scale_symmetric(max(-lo, hi, 0.0), bits), (-0.5 if bits == 1 else 0.0)
        else:
            s, z = scale_affine(lo, hi, bits)
        errors.append(np.sum((quantize(row, s, z, low, high) - row) ** 2))
    return np.array(errors)
