"""A plain float checkpoint whose weights lie on the trained grid: loads wherever the float model loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant.attach import ALIKE, EVERYWHERE, quant_layers, read_in_float
from lightning_quant.distributed import whole
from lightning_quant.errors import explain
from lightning_quant.estimators import overrides
from lightning_quant.export.layout import on_disk
from lightning_quant.export.stored import StoredTensors
from lightning_quant.export.writer import Sink, write_model_files
from lightning_quant.layers import QuantLayer
from lightning_quant.spec import QuantConfig


def write_folded(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None, inputs: Any = None
) -> None:
    """Write the model with on-grid weights under the float keys.

    Activations are not quantized in what comes out: a plain checkpoint has no place for their scales.

    Raises:
        ValueError: See ``check_folded``.
    """
    check_folded(model)
    for name, tensor, layer in sink.weights(model):
        value = whole(tensor) if layer is None else layer.on_grid()
        for key, part in on_disk(model, name, value).items():
            sink.add(key, part)
    write_model_files(model, sink, tokenizer, config, None)


def check_folded(model: nn.Module) -> None:
    """Refuse what a plain checkpoint cannot say.

    Raises:
        ValueError: The method maps a layer's input before it rounds it, or a weight is read in float elsewhere.
    """
    for path, other in read_in_float(model).items():
        where, got = f"{path} (format='folded')", f"one that {other} reads in float"
        raise ValueError(explain(where, EVERYWHERE, got, ALIKE))
    for path, quantized in quant_layers(model):
        inputs = quantized.input_quant
        if inputs is not None and overrides(inputs.estimator, "transform"):
            name = type(inputs.estimator).__name__.lower()
            expected, got = "inputs that are only rounded", f"what {name} maps them to before"
            cure = "No format here holds that map: train with float activations (a16) to export the weights."
            raise ValueError(explain(f"{path} (format='folded')", expected, got, cure))


def is_folded(path: Path) -> bool:
    """Whether there are weights."""
    return any(path.glob("model*.safetensors*"))


class StoredFolded(StoredTensors):
    """Read as the float model is: for ``layer``, weights count as integers."""

    format = "folded"
    rounds_inputs = False

    def layer(self, model: nn.Module, name: str, layer: QuantLayer) -> tuple[int, float]:
        """See the base class."""
        return self.differs(model, name, layer.on_grid()), 0.0
