"""Range observers by name."""

from __future__ import annotations

from lightning_quant.errors import unknown
from lightning_quant.observers.base import Observer
from lightning_quant.observers.ema import Ema
from lightning_quant.observers.minmax import MinMax
from lightning_quant.observers.mse import Mse

OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMax, "ema": Ema, "mse": Mse}


def build_observer(name: str | None, where: str) -> Observer:
    """The observer of that name.

    Raises:
        ValueError: Unknown name, with the nearest known one.
    """
    if name not in OBSERVERS:
        raise ValueError(unknown("observer", name, OBSERVERS, where))
    return OBSERVERS[name]()


__all__ = ["OBSERVERS", "Observer", "build_observer"]
