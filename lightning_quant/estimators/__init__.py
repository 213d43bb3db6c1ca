"""Methods by name."""

from __future__ import annotations

from typing import Any

from lightning_quant.errors import unknown
from lightning_quant.estimators.base import (
    About,
    Bins,
    Estimator,
    FakeQuantize,
    Gradient,
    Settings,
    demand,
    locate,
    option_names,
    overrides,
)
from lightning_quant.estimators.binary import Binary
from lightning_quant.estimators.bireal import BiReal
from lightning_quant.estimators.clip_q import ClipQ
from lightning_quant.estimators.compiled import CompiledFakeQuantize
from lightning_quant.estimators.dampen import Dampen
from lightning_quant.estimators.deferred import Deferred
from lightning_quant.estimators.dorefa import Dorefa
from lightning_quant.estimators.dsq import Dsq
from lightning_quant.estimators.ede import Ede
from lightning_quant.estimators.elq import Elq
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.floor import Floor
from lightning_quant.estimators.freeze import Freeze
from lightning_quant.estimators.hwgq import Hwgq
from lightning_quant.estimators.iao import Iao
from lightning_quant.estimators.inq import Inq
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.lsq_plus import LsqPlus
from lightning_quant.estimators.noise import Noise
from lightning_quant.estimators.pact import Pact
from lightning_quant.estimators.pege import Pege
from lightning_quant.estimators.pege_replace import PegeReplace
from lightning_quant.estimators.power import Power
from lightning_quant.estimators.react import React
from lightning_quant.estimators.seq import Seq
from lightning_quant.estimators.ste import Ste
from lightning_quant.estimators.stochastic import Stochastic
from lightning_quant.estimators.syq import Syq
from lightning_quant.estimators.tqt import Tqt
from lightning_quant.estimators.tsq import Tsq
from lightning_quant.estimators.twn import Twn

ESTIMATORS: dict[str, type[Estimator]] = {
    # how gradients pass
    "ste": Ste,
    "ewgs": Ewgs,
    "dsq": Dsq,
    "pege": Pege,
    "pege_replace": PegeReplace,
    "stochastic": Stochastic,
    "noise": Noise,
    "dampen": Dampen,
    "freeze": Freeze,
    "bireal": BiReal,
    "react": React,
    "ede": Ede,
    # what is learned of the grid
    "lsq": Lsq,
    "lsq_plus": LsqPlus,
    "tqt": Tqt,
    "pact": Pact,
    "seq": Seq,
    # forward maps
    "dorefa": Dorefa,
    "binary": Binary,
    "twn": Twn,
    "syq": Syq,
    "hwgq": Hwgq,
    "tsq": Tsq,
    "clip_q": ClipQ,
    "iao": Iao,
    "floor": Floor,
    "power": Power,
    # a part at a time
    "inq": Inq,
    "elq": Elq,
}


def build_estimator(method: str | Estimator, options: dict[str, Any] | None = None) -> Estimator:
    """The estimator of that name with these settings; an ``Estimator`` object passes through.

    Raises:
        ValueError: Unknown method or option, with the nearest known name.
    """
    if isinstance(method, Estimator):
        return method
    if method not in ESTIMATORS:
        message = unknown("method", method, ESTIMATORS, "QuantConfig.method")
        if ":" in method:
            message += f" A class of your own is registered first: ESTIMATORS[{method!r}] = ..."
        raise ValueError(message)
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
    "CompiledFakeQuantize",
    "Deferred",
    "Estimator",
    "FakeQuantize",
    "Gradient",
    "Settings",
    "build_estimator",
    "demand",
    "locate",
    "option_names",
    "overrides",
]
