"""A plain float checkpoint whose weights lie on the trained grid: loads wherever the float model loads."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_quant.distributed import whole
from lightning_quant.export.writer import Sink, float_tensors, write_model_files
from lightning_quant.progress import track
from lightning_quant.spec import QuantConfig


def write_folded(
    model: nn.Module, sink: Sink, *, target: str | None, tokenizer: Any, config: QuantConfig | None
) -> None:
    """Write the model with on-grid weights under the float keys.

    Activations are not quantized in what comes out: a plain checkpoint has no place for their scales.
    """
    for name, tensor, layer in track(list(float_tensors(model)), "writing weights"):
        sink.add(name, whole(tensor) if layer is None else layer.weight_quant.on_grid(layer.weight))
    write_model_files(model, sink, tokenizer, config, None)
