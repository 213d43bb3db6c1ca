"""What exports have in common: the model as it ships, the files beside the weights, the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant.adapters import acting_beside, check_merges, merged_beside, without_peft
from lightning_quant.attach import quant_layers
from lightning_quant.bypass import evaluating
from lightning_quant.export.shards import Sink
from lightning_quant.export.streamed import weights_on_disk
from lightning_quant.export.weights import float_tensors
from lightning_quant.layers import dense_bases, float_dtype
from lightning_quant.spec import QuantConfig

CONFIG_FILE = "quant_config.json"


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: The directory.
        format: Its format.
        total_bytes: Bytes of the tensors written.
        float_bytes: Bytes the same tensors had in training.
        files: Weight files, in order.
    """

    path: Path
    format: str
    total_bytes: int
    float_bytes: int
    files: list[str]

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.path}: {self.format}, {self.total_bytes / 2**20:.2f} MiB "
            f"(float {self.float_bytes / 2**20:.2f} MiB) in {len(self.files)} file(s)"
        )


def shipped_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a module that only wraps it (PEFT's too), else the module itself.

    Raises:
        ValueError: PEFT's wrapper holds what no weight can.
    """
    if not hasattr(model, "save_pretrained"):
        inner = [m for m in model.children() if hasattr(m, "save_pretrained")]
        held = sum(p.numel() for p in model.parameters())
        if len(inner) == 1 and sum(p.numel() for p in inner[0].parameters()) == held:
            model = inner[0]
    return without_peft(model)


@contextmanager
def as_shipped(model: nn.Module) -> Iterator[None]:
    """While open, the model computes what an export holds: evaluation mode, every adapter merged.

    Where weights are on disk adapters are merged into each as it is read, and only what cannot be merged is refused.
    """
    quantized = {id(layer) for _, layer in quant_layers(model)}
    if weights_on_disk(model) is not None:
        check_merges(model, quantized)
        with evaluating(model):
            yield
        return
    beside = [lora for _, lora in acting_beside(model, quantized)]
    with evaluating(model), dense_bases(model, beside), merged_beside(model, quantized):
        yield


def write_model_files(model: nn.Module, sink: Sink, tokenizer: Any, config: QuantConfig | None, extra: Any) -> None:
    """Write config.json (with ``extra`` as its ``quantization_config``), generation config, tokenizer, our config.

    Args:
        model: With a ``config`` if it is transformers'.
        sink: Where to.
        tokenizer: Or None.
        config: Or None.
        extra: Or None.
    """
    if config is not None:
        sink.json(CONFIG_FILE, config.to_dict())
    if not sink.writes:
        return
    data = config_json(model, extra)
    if data is not None:
        sink.json("config.json", data)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(sink.directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(sink.directory)


def config_json(model: nn.Module, quantization: Any) -> dict[str, Any] | None:
    """What config.json holds of a transformers model; None for others.

    Args:
        model: The model.
        quantization: Its ``quantization_config``, or None.
    """
    own = getattr(model, "config", None)
    if own is None or not hasattr(own, "save_pretrained"):
        return None
    data: dict[str, Any] = json.loads(own.to_json_string(use_diff=True))
    data["architectures"] = [type(model).__name__]
    data["dtype"] = str(float_dtype(model)).removeprefix("torch.")
    data.pop("quantization_config", None)  # what the base was stored in is not what is written
    if quantization is not None:
        data["quantization_config"] = quantization
        if quantization.get("kv_cache_scheme") and "num_attention_heads" in data:  # its reader looks for it
            data.setdefault("num_key_value_heads", data["num_attention_heads"])
    return data


__all__ = [
    "CONFIG_FILE",
    "ExportReport",
    "Sink",
    "as_shipped",
    "config_json",
    "float_tensors",
    "shipped_model",
    "write_model_files",
]
