"""Choosing codes from data, after training or without it: GPTQ, AdaRound, AdaQuant, BRECQ, QDrop, and to nearest."""

from lightning_quant.rounding.blockwise import round_model
from lightning_quant.rounding.methods import ROUNDINGS
from lightning_quant.rounding.report import RoundingReport

__all__ = ["ROUNDINGS", "RoundingReport", "round_model"]
