"""BRECQ: AdaRound's variables of all layers of a block, so that the block's output is that of the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.rounding.reconstruct import Reconstruct
from lightning_quant.rounding.unit import Errors, Unit


@dataclass(frozen=True)
class Brecq(Reconstruct):
    """Block by block, with the squared gradient of the loss as the importance of each number of the output.

        min over V   sum (dL/dy)^2 (y - y~)^2 + lambda sum(1 - |2 h(V) - 1|^beta)

    Importances have mean 1.  Without labels, or where the model is too large to run backward, all are 1.

    Source: Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426, eq. 10.

    **Deviation**: as ``AdaRound``; ranges of activations stay as calibrated.
    """

    needs_gradients: ClassVar[bool] = True
    drop: ClassVar[float] = 0.0

    def __call__(self, unit: Unit) -> Errors:
        """Round the unit's layers."""
        layers = unit.readers()
        if not layers or unit.targets is None:
            return {}
        path = next(iter(layers)) if len(layers) == 1 else unit.path
        return {path: self.optimize(unit, layers, unit.targets, self.drop)}
