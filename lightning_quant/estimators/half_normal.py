"""The best levels for the absolute value of a normal variable, above a threshold."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

TOLERANCE = 1e-13


@lru_cache(maxsize=256)
def half_normal_levels(count: int, theta: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Levels of least squared error (Lloyd-Max) for |x| where it is above epsilon; x normal with variance 1.

    Both conditions hold: a level is the mean over its bin, and bins meet in the middle of two levels.

    Args:
        count: How many levels.
        theta: Share of all |x| that lies below epsilon, in [0, 1).

    Returns:
        (lower ends of the bins, of which the first is epsilon; levels), both ascending.

    >>> [round(v, 5) for v in half_normal_levels(2, 0.0)[1]]
    [0.45278, 1.51042]
    """
    start = NormalDist().inv_cdf((1 + theta) / 2)
    # Many levels lie as densely as the cube root of the density, which is normal with variance 3.
    wide = NormalDist(0.0, math.sqrt(3))
    below = wide.cdf(start)
    places = [wide.inv_cdf(below + (1 - below) * (i + 0.5) / count) for i in range(count)]
    levels = torch.tensor(places, dtype=torch.float64)
    for _ in range(20):
        levels = levels - _step(levels, start)[0]
    for _ in range(50):
        residual, slopes = _step(levels, start)
        levels = levels - torch.linalg.solve(slopes, residual)
        if residual.abs().max() < TOLERANCE:
            break
    return tuple(_bounds(levels, start)[:-1].tolist()), tuple(levels.tolist())


def _bounds(levels: Tensor, start: float) -> Tensor:
    ends = levels.new_tensor([start, math.inf])
    return torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])


def _step(levels: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """Levels less the means of their bins, and that difference's Jacobian."""
    bounds = _bounds(levels, start)
    low, high = bounds[:-1], bounds[1:]
    density = math.sqrt(2 / math.pi) * torch.exp(-bounds.square() / 2)
    tail = torch.special.erfc(bounds / math.sqrt(2))
    mass = tail[:-1] - tail[1:]
    mean = (density[:-1] - density[1:]) / mass
    left = density[:-1] * (mean - low) / mass / 2
    right = torch.zeros_like(left)
    right[:-1] = density[1:-1] * (high[:-1] - mean[:-1]) / mass[:-1] / 2
    left[0] = 0.0
    slopes = torch.diag(1 - left - right) - torch.diag(left[1:], -1) - torch.diag(right[:-1], 1)
    return levels - mean, slopes
