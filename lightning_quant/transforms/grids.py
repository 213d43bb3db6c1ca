"""The grids that training will put weights and inputs on, for transforms that look ahead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_quant.attach import layer_quantizers
from lightning_quant.estimators import Estimator, build_estimator
from lightning_quant.plan import LayerPlan, make_plan
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import QuantConfig


@dataclass(frozen=True)
class LayerGrid:
    """How one layer's weight and inputs will be rounded.

    Attributes:
        plan: What ``attach`` would make of the layer.
        config: Of the run.
        weights: The weights' estimator.
        inputs: The inputs' estimator.
    """

    plan: LayerPlan
    config: QuantConfig
    weights: Estimator
    inputs: Estimator

    @torch.no_grad()
    def weight(self, w: Tensor) -> Tensor:
        """A weight of the layer's shape on the grid that fits it."""
        quantizer, _ = self._quantizers()
        quantizer.eval()
        quantizer.fit_range(w)
        return quantizer.on_grid(w)

    @torch.no_grad()
    def input(self, x: Tensor) -> Tensor:
        """An input on its grid, a static one being fitted to it; as it is where inputs stay in float."""
        _, quantizer = self._quantizers()
        if quantizer is None:
            return x
        quantizer.eval()
        if not quantizer.spec.dynamic:
            quantizer.observe(x)
            quantizer.commit()
        y: Tensor = quantizer(x)
        return y

    def _quantizers(self) -> tuple[FakeQuantizer, FakeQuantizer | None]:
        return layer_quantizers(self.plan, self.config, self.weights, self.inputs)


def layer_grids(model: nn.Module, config: QuantConfig) -> dict[str, LayerGrid]:
    """The grid of every layer that ``attach(model, config)`` would quantize, by path; nothing is changed."""
    estimator = build_estimator(config.method, dict(config.options))
    plan = make_plan(model, config, estimator)
    weights, inputs = estimator.role(True), estimator.role(False)
    weights = weights.fit({p.path: p.rows for p in plan.layers}, {p.path: p.scales for p in plan.layers})
    return {p.path: LayerGrid(p, config, weights, inputs) for p in plan.layers}
