"""AdaRound: each weight goes down or up, whichever lets its layer's outputs be those of the float model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quant.bypass import bypassed
from lightning_quant.layers import QuantLayer
from lightning_quant.rounding.reconstruct import Reconstruct
from lightning_quant.rounding.unit import Call, Errors, Unit, first_tensor, stages, watched


@dataclass(frozen=True)
class AdaRound(Reconstruct):
    """Layer by layer, on inputs that the rounded layers before it made (asymmetric reconstruction).

        min over V   ||W x - W~ x^||^2 + lambda sum(1 - |2 h(V) - 1|^beta),   beta from 20 to 2

    Source: Nagel et al., ICML 2020, arXiv:2004.10568, eq. 21-25.

    **Deviation**: the error is relative to that of rounding to nearest and so is the penalty's weight, which makes 500
    steps of size 0.1 enough where 10,000 of 1e-3 are usual; an activation function after the layer is not part of
    what is reconstructed.
    """

    def __call__(self, unit: Unit) -> Errors:
        """Round the unit's layers."""
        layers = unit.readers()
        exact = _inputs(unit, layers, unit.float_calls or unit.calls, in_float=True)
        found: Errors = {}
        for stage in stages(unit, layers) if layers else []:
            now = {path: layers[path] for path in stage}
            inputs = _inputs(unit, now, unit.calls, in_float=False)
            for path, layer in now.items():
                if not inputs[path]:
                    unit.to_nearest(path, layer, "no calibration input reached it")
                    continue
                found[path] = self._layer(unit, path, layer, inputs[path], exact[path])
        return found

    def _layer(
        self, unit: Unit, path: str, layer: QuantLayer, inputs: list[Tensor], exact: list[Tensor]
    ) -> tuple[float, float]:
        if [x.shape for x in exact] != [x.shape for x in inputs]:  # an expert that other tokens reach now
            exact = inputs
        with torch.no_grad(), bypassed(layer):
            targets = [first_tensor(Call((x,)).run(layer)) for x in exact]
        own = Unit(path, layer, [Call((x,)) for x in inputs], [Call((x,)) for x in exact], seed=unit.seed)
        return self.optimize(own, {path: layer}, targets)


@torch.no_grad()
def _inputs(unit: Unit, layers: dict[str, QuantLayer], calls: list[Call], in_float: bool) -> dict[str, list[Tensor]]:
    """Inputs of layers, by path; one tensor where several read the same."""
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    kept: list[Tensor] = []

    def see(path: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        if not (kept and kept[-1].shape == x.shape and torch.equal(kept[-1], x)):
            kept.append(x.clone())
        found[path].append(kept[-1])

    for call in calls:
        with watched(layers, see):
            if in_float:
                with bypassed(unit.module):
                    call.run(unit.module)
            else:
                call.run(unit.module)
    return found
