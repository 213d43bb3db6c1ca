"""Range observers by name."""

from __future__ import annotations

from lightning_quant.errors import unknown
from lightning_quant.observers.absmean import AbsMean
from lightning_quant.observers.aciq import AciqGauss, AciqLaplace
from lightning_quant.observers.als import Als
from lightning_quant.observers.base import Observer
from lightning_quant.observers.bn_stats import BnStats
from lightning_quant.observers.ema import Ema
from lightning_quant.observers.half_gauss import HalfGauss, HalfGaussUnit
from lightning_quant.observers.kl import Kl
from lightning_quant.observers.lp import Lp
from lightning_quant.observers.lsq_init import LsqInit
from lightning_quant.observers.minmax import MinMax
from lightning_quant.observers.mse import Mse
from lightning_quant.observers.mse_ends import MseEnds
from lightning_quant.observers.percentile import Percentile
from lightning_quant.observers.rms import Rms
from lightning_quant.observers.seq_init import SeqInit
from lightning_quant.observers.three_sigma import ThreeSigma
from lightning_quant.observers.twn import Twn
from lightning_quant.observers.unit import Unit

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "ema": Ema,
    "mse": Mse,
    "mse_ends": MseEnds,
    "lp": Lp,
    "lsq_init": LsqInit,
    "three_sigma": ThreeSigma,
    "seq_init": SeqInit,
    "unit": Unit,
    "absmean": AbsMean,
    "twn": Twn,
    "half_gauss": HalfGauss,
    "half_gauss_unit": HalfGaussUnit,
    "als": Als,
    "rms": Rms,
    "percentile": Percentile,
    "kl": Kl,
    "aciq_gauss": AciqGauss,
    "aciq_laplace": AciqLaplace,
    "bn_stats": BnStats,
}


def build_observer(name: str | None, where: str) -> Observer:
    """The observer of that name.

    Raises:
        ValueError: Unknown name, with the nearest known one.
    """
    if name not in OBSERVERS:
        raise ValueError(unknown("observer", name, OBSERVERS, where))
    return OBSERVERS[name]()


__all__ = ["OBSERVERS", "Observer", "build_observer"]
