"""The formulas once more, in float64 numpy, straight from the papers.  Imports nothing of the packages under test.

Arrays are float64; ``u = x / s + z`` in code units; ``low`` and ``high`` bound the codes; every function works
element by element on arrays that already broadcast.  ``np.round`` rounds half to even.
"""

from __future__ import annotations

import numpy as np

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


# --- backward rules: each returns dL/dx, the part D * g that feeds the scale, and dL/dtheta per element ---------------


def ste(g, x, s, z, low, high, clips=True):
    """Bengio et al. 2013, clipped: the identity inside the range."""
    mask = inside(x, s, z, low, high) if clips else 1.0
    return g * mask, g * mask, None


def ewgs(g, x, s, z, low, high, delta, clips=True):
    """Lee et al. 2021, eq. 5 with x_n, x_q normalised to [0, 1] over the whole range."""
    u = np.clip(x / s + z, low, high)
    x_n, x_q = (u - low) / (high - low), (np.round(u) - low) / (high - low)
    mask = inside(x, s, z, low, high) if clips else 1.0
    gx = g * (1 + delta * np.sign(g) * (x_n - x_q)) * mask
    return gx, gx, None


def dsq(g, x, s, z, low, high, alpha, clips=True):
    """Gong et al. 2019: slope of the tanh staircase; dL/dalpha with the bin index held fixed."""
    _, r = offset(x, s, z, low, high)
    stretch, k = 1 / (1 - alpha), np.log(2 / alpha - 1)
    sech2 = 1 / np.cosh(k * r) ** 2
    mask = inside(x, s, z, low, high) if clips else 1.0
    gx = g * mask * stretch * k / 2 * sech2
    d_alpha = s / 2 * (stretch**2 * np.tanh(k * r) - stretch * 2 * r / (alpha * (2 - alpha)) * sech2)
    return gx, gx, g * mask * d_alpha


def surrogate(x, s, z, low, high, b, k):
    """F in code units, dF/du and dF/db of the learned surrogate."""
    u, r = offset(x, s, z, low, high)
    top = np.tanh(k / 2)
    phi = np.tanh(k * r) / (2 * top)
    slope = k / np.cosh(k * r) ** 2 / (2 * top)
    return u + b * (phi - r), 1 + b * (slope - 1), phi - r


def pege(g, x, s, z, low, high, b, k, lam, clips=True):
    """Hard forward, backward of y = F + stopgrad(Q - F) with lam * (F - Q)^2 added to the loss."""
    f, d, gap = surrogate(x, s, z, low, high, b, k)
    error = s * (f - code(x, s, z, low, high))
    mask = inside(x, s, z, low, high) if clips else 1.0
    total = (g + 2 * lam * error) * mask
    return total * d, g * mask * d, s * total * gap


def pege_replace(g, x, s, z, low, high, m, lam, clips=True):
    """Random replacement: x~ = x + m (Q(x) - x), with lam * (m (x - Q(x)))^2 added to the loss."""
    mask = inside(x, s, z, low, high) if clips else 1.0
    error = (np.clip(x / s + z, low, high) - code(x, s, z, low, high)) * s
    return g * mask + 2 * lam * m * error, g * mask, None


def scale_terms(g, task, x, s, z, low, high):
    """Per-element terms of dL/ds: chain rule through s * (Q(x/s + z) - z) with the estimator's dQ/du."""
    u = np.clip(x / s + z, low, high)
    return g * (np.round(u) - z) - task * (u - z)


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
