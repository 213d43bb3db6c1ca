"""Round to nearest: what evaluation does anyway, written into the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.rounding.held import Held
from lightning_quant.rounding.unit import Errors, Unit


@dataclass(frozen=True)
class Rtn:
    """Each weight takes the nearest level: the baseline.

    Class attributes: ``needs_float``, whether the float model's activations are needed beside those of the rounded
    one; ``needs_gradients``, whether the loss's gradients at outputs of blocks are asked for.
    """

    needs_float: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    def __call__(self, unit: Unit) -> Errors:
        """Round the unit's layers."""
        for path, layer in unit.layers().items():
            held = Held(layer, path)
            held.write(held.nearest(held.rows))
        return {}
