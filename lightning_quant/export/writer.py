"""Writing a checkpoint directory: shard by shard, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.adapters import float_paths, merged_beside, without_peft
from lightning_quant.attach import deployed_norm, quant_layers, quantizers
from lightning_quant.bypass import evaluating
from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.packed import PackedLinear
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


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside ``path`` that becomes it if the block ends well and vanishes if not.

    Raises:
        FileExistsError: ``path`` exists; nothing is touched.
    """
    if path.exists():
        raise FileExistsError(
            explain(
                str(path), "a directory that does not exist yet", "an existing one", "Choose another, or remove it."
            )
        )
    distributed.barrier()  # no rank looks after another has finished
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
        if distributed.rank() == 0:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


class Sink:
    """Takes named tensors, keeps at most one shard of them, writes the shards and their index.

    Args:
        directory: Where to write.
        max_shard_bytes: A shard is written before it grows beyond this.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self.writes = distributed.rank() == 0
        self.total_bytes = self.float_bytes = 0
        self.files: list[str] = []
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._shards = 0

    def add(self, name: str, tensor: Tensor, float_bytes: int | None = None) -> None:
        """Take one tensor.

        Args:
            name: Its key.
            tensor: Its value, whole.
            float_bytes: What it took in training; None: the same.
        """
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_shard_bytes:
            self._flush()
        self.total_bytes += size
        self.float_bytes += size if float_bytes is None else float_bytes
        if self.writes:
            self._held[name] = tensor.detach().cpu().contiguous()
            self._held_bytes += size
            self._shard_of[name] = self._shards

    def file(self, name: str, float_bytes: int) -> None:
        """Count a weight file that a format has written into ``directory`` itself.

        Args:
            name: Its name.
            float_bytes: What its tensors took in training.
        """
        self.files.append(name)
        self.total_bytes += (self.directory / name).stat().st_size
        self.float_bytes += float_bytes

    def json(self, name: str, data: Any) -> None:
        """Write a JSON file."""
        if self.writes:
            (self.directory / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    def finish(self) -> None:
        """Write what is left, give the shards their final names, write the index."""
        self._flush()
        names = ["model.safetensors"]
        if self._shards > 1:
            names = [f"model-{i + 1:05d}-of-{self._shards:05d}.safetensors" for i in range(self._shards)]
        for i, name in enumerate(names[: self._shards]):
            os.replace(self.directory / f"shard-{i}", self.directory / name)
        self.files += names[: self._shards]
        if self._shards > 1:
            index = {k: names[i] for k, i in self._shard_of.items()}
            self.json(
                "model.safetensors.index.json", {"metadata": {"total_size": self.total_bytes}, "weight_map": index}
            )

    def _flush(self) -> None:
        if not self._held:
            return
        save_file(self._held, self.directory / f"shard-{self._shards}", metadata={"format": "pt"})
        self._shards += 1
        self._held, self._held_bytes = {}, 0


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
    """While open, the model computes what an export holds: evaluation mode, every adapter merged."""
    with evaluating(model), merged_beside(model, {id(layer) for _, layer in quant_layers(model)}):
        yield


def float_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, QuantLayer | None]]:
    """The float model's state dict, each storage once, with the quantized layer that owns a weight.

    Biases and normalizations that were folded have the values that ship beside the folded weight; adapters are left
    out (see ``as_shipped``), and what PEFT wrapped has the name it was born with.
    """
    layers = {layer.weight_name(path): layer for path, layer in quant_layers(model)}
    mine = tuple(f"{path}." for path, _ in quantizers(model))
    names = float_paths(model)
    shipped = {id(tensor): value for layer in layers.values() for tensor, value in _shipped(layer)}
    packed = {f"{path}.weight_codes": m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    scales = {key.removesuffix("codes") + "scale" for key in packed}
    seen: set[tuple[Any, ...]] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = key.rpartition(".")
        name = names.get(path, path)
        if key.startswith(mine) or name is None or key in scales:
            continue
        if key in packed:
            yield f"{name}.weight", packed[key].weight, layers.get(f"{path}.weight")
            continue
        storage = distributed.to_local(tensor)
        place = (storage.data_ptr(), storage.shape, storage.stride())
        if storage.numel() and place in seen:
            continue
        seen.add(place)
        yield f"{name}.{leaf}" if name else leaf, shipped.get(id(tensor), tensor.detach()), layers.get(key)


def _shipped(layer: QuantLayer) -> list[tuple[Tensor, Tensor]]:
    """Tensors beside a layer's weight that ship with another value than they have in training."""
    found = deployed_norm(layer)
    if layer.folds and not found and layer.bias is not None:
        found.append((layer.bias, layer.folded()[1].detach()))  # type: ignore[union-attr]
    return found


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
    data["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if quantization is not None:
        data["quantization_config"] = quantization
    return data
