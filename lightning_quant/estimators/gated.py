"""What methods share that compute with float values in training until a share of the run is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_quant.estimators.base import Estimator
from lightning_quant.schedule import Schedule

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Gated(Estimator):
    """Float in training before the share ``input_delay`` of the run, quantized from there on; evaluation always is."""

    input_delay: float = 0.0

    def schedules(self) -> Mapping[str, Schedule]:
        """The gate: 0 before, 1 after."""
        return {"gate": Schedule("constant", 0.0, 1.0, self.input_delay)}

    def inputs(self, quantizer: FakeQuantizer, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The gate."""
        return (quantizer.gate,)

    def blend(self, x: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """Float until the gate opens."""
        return torch.where(inputs[0] >= 0.5, y, x)
