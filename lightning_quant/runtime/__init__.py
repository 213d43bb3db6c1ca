"""Run an int4 or int8 export fast, on PyTorch's own low-bit kernels."""

from __future__ import annotations

from lightning_quant.runtime.base import LowBitLinear
from lightning_quant.runtime.convert import convert
from lightning_quant.runtime.load import load, plan
from lightning_quant.runtime.report import Line, Plan

__all__ = ["Line", "LowBitLinear", "Plan", "convert", "load", "plan"]
