"""Gradient estimators by name."""

from __future__ import annotations

from typing import Any

from lightning_quant.errors import unknown
from lightning_quant.estimators.base import (
    About,
    Bins,
    Estimator,
    FakeQuantize,
    Gradient,
    demand,
    locate,
    option_names,
    overrides,
)
from lightning_quant.estimators.dsq import Dsq
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.pege import Pege
from lightning_quant.estimators.pege_replace import PegeReplace
from lightning_quant.estimators.ste import Ste

ESTIMATORS: dict[str, type[Estimator]] = {
    "ste": Ste,
    "lsq": Lsq,
    "ewgs": Ewgs,
    "dsq": Dsq,
    "pege": Pege,
    "pege_replace": PegeReplace,
}


def build_estimator(method: str | Estimator, options: dict[str, Any] | None = None) -> Estimator:
    """The estimator of that name with these settings; an ``Estimator`` object passes through.

    Raises:
        ValueError: Unknown method or option, with the nearest known name.
    """
    if isinstance(method, Estimator):
        return method
    if method not in ESTIMATORS:
        raise ValueError(unknown("method", method, ESTIMATORS, "QuantConfig.method"))
    kind = ESTIMATORS[method]
    known = option_names(kind)
    for name in options or {}:
        if name not in known:
            raise ValueError(unknown("option", name, known or ["(none)"], f"options of method {method!r}"))
    return kind(**(options or {}))


__all__ = [
    "ESTIMATORS",
    "About",
    "Bins",
    "Estimator",
    "FakeQuantize",
    "Gradient",
    "build_estimator",
    "demand",
    "locate",
    "option_names",
    "overrides",
]
