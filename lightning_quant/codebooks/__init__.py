"""Codebooks by name: what ``TensorSpec.grid`` may say beside ``int`` and ``midrise``."""

from __future__ import annotations

from lightning_quant.codebooks.apot import Apot
from lightning_quant.codebooks.base import Codebook
from lightning_quant.codebooks.floats import Float4, SmallFloat
from lightning_quant.codebooks.nf4 import Nf4
from lightning_quant.codebooks.pow2 import Pow2

CODEBOOKS: dict[str, Codebook] = {
    "nf4": Nf4(),
    "e4m3": SmallFloat(4, 3, 7, 448.0),
    "e5m2": SmallFloat(5, 2, 15, 57344.0),
    "e2m1": Float4(),
    "apot": Apot(),
    "pow2": Pow2(),
}

__all__ = ["CODEBOOKS", "Codebook"]
