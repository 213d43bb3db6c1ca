"""Choosing codes from data, after training or without it: GPTQ, AdaRound, AdaQuant, BRECQ, QDrop, and to nearest.

LAPQ chooses the ranges that they are on.
"""

from lightning_quant.rounding.blockwise import round_model
from lightning_quant.rounding.lapq import LapqReport, lapq
from lightning_quant.rounding.methods import ROUNDINGS, TUNINGS
from lightning_quant.rounding.report import RoundingReport

__all__ = ["ROUNDINGS", "TUNINGS", "LapqReport", "RoundingReport", "lapq", "round_model"]
