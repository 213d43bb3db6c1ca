"""Mixed precision: which layers bear few bits, and which width each gets within a budget.

``sensitivity`` tries schemes on every layer of a float model and says what is lost; ``recipe`` of its result chooses
(``lightning_quant.allocation``) and returns the rules that a ``QuantConfig`` takes.
"""

from __future__ import annotations

from lightning_quant.sensitivity.budgets import Budget, read_seconds
from lightning_quant.sensitivity.result import Recipe, Sensitivity
from lightning_quant.sensitivity.survey import sensitivity

__all__ = ["Budget", "Recipe", "Sensitivity", "read_seconds", "sensitivity"]
