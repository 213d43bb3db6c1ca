"""BRECQ: AdaRound's variables of all layers of a block, so that the block's output is that of the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_quant.rounding.reconstruct import Reconstruct
from lightning_quant.rounding.unit import Errors, Unit


@dataclass(frozen=True)
class Brecq(Reconstruct):
    """Block by block: all layers of a block together, by the squared error of the block's output.

        min over V   sum (y - y~)^2 + lambda sum(1 - |2 h(V) - 1|^beta)

    With ``importance`` each number of the output is weighted with the squared gradient of the loss there, of mean 1.
    Without labels, or where the model is too large to run backward, all weights are 1.

    Args:
        importance: Weight with squared gradients.
        iterations: See ``Reconstruct``.
        lr: See ``Reconstruct``.
        regularizer: See ``Reconstruct``.

    Source: Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426, eq. 10.

    **Deviation**: as ``AdaRound``; squared gradients are an option, since few tokens have nearly all of their sum, and
    with them the demo's language model came out worse than by ``AdaRound``; ranges of activations stay as calibrated.
    """

    drop: ClassVar[float] = 0.0

    importance: bool = False

    @property
    def needs_gradients(self) -> bool:
        """Whether squared gradients are asked for."""
        return self.importance

    def __call__(self, unit: Unit) -> Errors:
        """Round the unit's layers."""
        layers = unit.readers()
        if not layers or unit.targets is None:
            return {}
        path = next(iter(layers)) if len(layers) == 1 else unit.path
        return {path: self.optimize(unit, layers, unit.targets, self.drop)}
