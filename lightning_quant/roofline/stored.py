"""What an export in the compressed-tensors format holds of every tensor, in bytes, without a weight.

The export's own code runs on the meta device, where tensors have shapes and no values, so these are its bytes and its
refusals, not an estimate of them.  Of layers that are alike one is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from lightning_quant.attach import attach, quantizers
from lightning_quant.estimators import build_estimator
from lightning_quant.export.compressed_tensors import write_compressed_tensors
from lightning_quant.export.shards import Sink
from lightning_quant.export.weights import float_tensors
from lightning_quant.layers import QuantLayer
from lightning_quant.plan import LayerPlan, make_plan
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import INHERIT, LayerRule, QuantConfig

PARTS = {  # by the end of a stored tensor's name
    "weight_packed": "codes",
    "weight": "codes",
    "weight_shape": "shapes",
    "zero_point": "zero points",
    "scale": "scales",
}
FLOAT = "float"


@dataclass(frozen=True)
class Stored:
    """A model's tensors as they are stored.

    Attributes:
        tensors: Name in the float model -> part (``codes``, ``scales``, ``zero points``, ``shapes``, ``float``) ->
            bytes.  A tensor with several names has one of them; scales of keys and values have names of their own.
        inputs: Path of a quantized layer -> resolved spec of its inputs, None where they are float.  Fused experts
            have the paths of their weights.
    """

    tensors: dict[str, dict[str, int]]
    inputs: dict[str, TensorSpec | None]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part, in all."""
        found: dict[str, int] = {}
        for parts in self.tensors.values():
            for part, size in parts.items():
                found[part] = found.get(part, 0) + size
        return found

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.parts.values())


def stored(model: nn.Module, config: QuantConfig | None) -> Stored:
    """Count the bytes of the export that a model would have; the model stays as it is.

    Args:
        model: A float model of transformers, on the meta device.
        config: What would be quantized and how; None: nothing.

    Raises:
        ValueError: See ``write_compressed_tensors`` and ``attach``.
    """
    tensors = {name: {FLOAT: _size(tensor)} for name, tensor, _ in float_tensors(model)}
    if config is None or config.weight is None:
        return Stored(tensors, {})
    rule = build_estimator(config.method, dict(config.options))
    plan = make_plan(model, config, rule, values=False)
    first: dict[str, LayerPlan] = {}
    for layer in plan.layers:
        first.setdefault(_alike(layer), layer)
    written, further = _written(model, config, list(first.values()))
    for layer in plan.layers:
        tensors[_weight(layer)] = written[first[_alike(layer)].path]
    return Stored(tensors | further, {layer.path: layer.activation for layer in plan.layers})


def _alike(layer: LayerPlan) -> str:
    """Layers of one such key are stored in equally many bytes."""
    return repr((layer.kind, layer.shape, layer.dtype, layer.weight, layer.activation))


def _weight(layer: LayerPlan) -> str:
    """The weight's name in the float model."""
    return layer.path if layer.kind.stacked else f"{layer.path}.weight"


def _written(
    model: nn.Module, config: QuantConfig, layers: list[LayerPlan]
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """What is written of these layers, by path, and what belongs to no layer."""
    model = copy.deepcopy(model)
    rules = [LayerRule(layer.path, layer.weight, layer.activation) for layer in layers]
    only = replace(config, rules=(*rules, LayerRule("*", weight=None)), first_last=INHERIT, setup=())
    attach(model, only, fit=False)
    items = {name: layer for name, _, layer in float_tensors(model) if layer is not None}
    for _, q in quantizers(model):
        q.to("meta").ready = True  # its range has a shape, and nobody asks for values
    ledger = _Ledger(items)
    write_compressed_tensors(model, ledger, target=None, tokenizer=None, config=None)
    return {layer.path: ledger.found[_weight(layer)] for layer in layers}, ledger.further


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Ledger(Sink):
    """Notes sizes in place of writing.

    Args:
        layers: Names of the weights to be written, and their layers.
    """

    def __init__(self, layers: dict[str, QuantLayer]) -> None:
        super().__init__(Path(), 0)
        self.writes = False
        self.layers = layers
        self.found: dict[str, dict[str, int]] = {}
        self.further: dict[str, dict[str, int]] = {}
        self.of: dict[str, int] | None = None

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor, QuantLayer | None]]:
        """The layers' weights alone."""
        for name, layer in self.layers.items():
            self.of = self.found.setdefault(name, {})
            yield name, layer.weight, layer
        self.of = None

    def add(self, name: str, tensor: Tensor, float_bytes: int | None = None) -> None:
        """Note one tensor."""
        part = next(part for end, part in PARTS.items() if name.endswith(end))
        parts = self.further.setdefault(name, {}) if self.of is None else self.of
        parts[part] = parts.get(part, 0) + _size(tensor)
