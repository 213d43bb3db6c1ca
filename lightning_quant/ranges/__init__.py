"""Ranges by name."""

from __future__ import annotations

from lightning_quant.errors import unknown
from lightning_quant.ranges.base import Range
from lightning_quant.ranges.bounds import Bounds
from lightning_quant.ranges.clip import Clip
from lightning_quant.ranges.log2 import Log2
from lightning_quant.ranges.offset import Offset
from lightning_quant.ranges.plain import Plain
from lightning_quant.ranges.scale import Scale

RANGES: dict[str, type[Range]] = {
    "scale": Scale,
    "offset": Offset,
    "bounds": Bounds,
    "log2": Log2,
    "clip": Clip,
    "plain": Plain,
}


def build_range(name: str, where: str) -> Range:
    """The range of that name.

    Raises:
        ValueError: Unknown name, with the nearest known one.
    """
    if name not in RANGES:
        raise ValueError(unknown("range", name, RANGES, where))
    return RANGES[name]()


__all__ = ["RANGES", "Range", "build_range"]
