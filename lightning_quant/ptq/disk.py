"""Blocks of a model on disk: one at a time in memory, and each written as soon as it is rounded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_quant.attach import quant_layers, without_quantizers
from lightning_quant.checkpoint import damaged_weights, save_quant_state
from lightning_quant.export.atomic import Journal, flush
from lightning_quant.export.layout import on_disk
from lightning_quant.export.streamed import INDEX, DiskWeights, weights_on_disk
from lightning_quant.rounding.blockwise import Keeper
from lightning_quant.rounding.held import Held
from lightning_quant.rounding.report import RoundingReport
from lightning_quant.spec import QuantConfig

STATE = "block-state-"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


class DiskKeeper(Keeper):
    """Brings blocks from a model's directory, and keeps them rounded in another.

    Args:
        model: With quantizers, from ``on_meta``.
        paths: Its blocks'.
        work: Where rounded blocks go, one file of weights and one of quantizers' state each.
        journal: Of the finished ones.
        report: Whose entries of a finished block are noted beside it.
    """

    def __init__(
        self, model: nn.Module, paths: list[str], work: Path, journal: Journal, report: RoundingReport
    ) -> None:
        self.model, self.work, self.journal, self.report = model, work, journal, report
        self.weights: DiskWeights = weights_on_disk(model)  # type: ignore[assignment]
        self.paths = paths
        self.numbers = {path: number for number, path in enumerate(["", *paths])}
        self.meta: dict[tuple[str, str], Tensor] = {}
        self.finished = {entry["unit"]: entry for entry in journal.shards if self._is_whole(entry)}

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        return all((p := self.work / n).is_file() and p.stat().st_size == size for n, size in entry["files"].items())

    def _outside(self, name: str) -> bool:
        return not name.startswith(tuple(f"{path}." for path in self.paths))

    def open_outside(self) -> None:
        """Make everything that is in no block real, for as long as the model lasts."""
        self._fill("")
        self._fit("")

    def open(self, path: str) -> None:
        """See the base class."""
        self._fill(path)
        self._fit(path)

    def _fit(self, path: str) -> None:
        for _, layer in self._layers(path):
            if not layer.weight_quant.ready:
                layer.weight_quant.fit_range(layer.weight)

    def _layers(self, path: str) -> Iterator[tuple[str, Any]]:
        for name, layer in quant_layers(self.model):
            if name == path or (name.startswith(f"{path}.") if path else self._outside(name)):
                yield name, layer

    def _fill(self, path: str) -> None:
        """Read the tensors of a block (of what is in none) from the model's directory; tied ones stay tied."""
        made: dict[int, Tensor] = {}
        waiting = []
        for name, table, leaf, tensor in list(self._tensors(path)):
            if not tensor.is_meta:
                continue
            self.meta[name, leaf] = tensor
            waiting.append((name, table, leaf, tensor))
            full = f"{name}.{leaf}".lstrip(".")
            if full in self.weights.sources and id(tensor) not in made:
                value = self.weights.read(full, tensor)
                own = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(value, requires_grad=False) if own else value
        for name, table, leaf, tensor in waiting:
            if id(tensor) not in made:
                raise damaged_weights(self.weights.directory, f"none for {name}.{leaf}".replace(" .", " "))
            table[leaf] = made[id(tensor)]

    def _tensors(self, path: str) -> Iterator[tuple[str, dict[str, Any], str, Tensor]]:
        """Where a block (or what is in none) holds tensors that are on disk: module path, its table, name, tensor."""
        for name, module in self.model.named_modules():
            if not (name == path or (name.startswith(f"{path}.") if path else self._outside(f"{name}."))):
                continue
            for table, skipped in ((module._parameters, set()), (module._buffers, module._non_persistent_buffers_set)):
                for leaf, tensor in table.items():
                    if tensor is not None and leaf not in skipped:
                        yield name, table, leaf, tensor  # type: ignore[misc]

    def close(self, path: str) -> None:
        """Let go of a block's weights."""
        for name, table, leaf, _ in list(self._tensors(path)):
            if (name, leaf) in self.meta:
                table[leaf] = self.meta.pop((name, leaf))

    def restore(self, path: str) -> bool:
        """See the base class."""
        entry = self.finished.get(path)
        if entry is None:
            return False
        for name, _, leaf, tensor in list(self._tensors(path)):
            full = f"{name}.{leaf}".lstrip(".")
            if full in self.rounded.sources:
                tensor.data.copy_(self.rounded.read(full, tensor))
        with safe_open(self.work / state_file(self.numbers[path]), framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.model.load_state_dict(state, strict=False)
        self.report.errors.update({name: (pair[0], pair[1]) for name, pair in entry["errors"].items()})
        self.report.nearest.update(entry["nearest"])
        return True

    @cached_property
    def rounded(self) -> DiskWeights:
        """The finished blocks' weights."""
        files: dict[str, str] = {}
        shapes: dict[str, Tensor] = {}
        for path in self.finished:
            name = weight_file(self.numbers[path])
            with safe_open(self.work / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    files[key] = name
                    shapes[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
        return DiskWeights(self.model, self.work, files, shapes)

    def store(self, path: str) -> None:
        """See the base class."""
        number, parts, seen = self.numbers[path], {}, set()
        for name, _, leaf, tensor in self._tensors(path):
            full = f"{name}.{leaf}".lstrip(".")
            if id(tensor) not in seen and full in self.weights.sources:
                seen.add(id(tensor))
                parts.update(on_disk(self.model, full, tensor.detach()))
        own = [name for name, _ in self._layers(path)]
        state = without_quantizers(self.model.state_dict(), self.model)[1]
        mine = {k: v for k, v in state.items() if (k.startswith(f"{path}.") if path else self._outside(k))}
        files = {}
        for file, tensors in ((weight_file(number), parts), (state_file(number), mine)):
            files[file] = _written(self.work / file, tensors)
        layers = [*own, path]
        errors = {name: list(pair) for name, pair in self.report.errors.items() if name in layers}
        nearest = {name: why for name, why in self.report.nearest.items() if name in layers}
        self.journal.add({"unit": path, "files": files, "errors": errors, "nearest": nearest})

    @property
    def is_finished(self) -> bool:
        """Whether every block has been rounded before."""
        return self.finished.keys() >= self.numbers.keys()

    def finish(self, config: QuantConfig) -> None:
        """Store what is in no block, and make a training directory of it all."""
        done = {entry["unit"] for entry in self.journal.shards}
        for path in self.paths:
            if path not in done:  # no batch reaches it
                self.open(path)
                for name, layer in self._layers(path):
                    held = Held(layer, name)
                    held.write(held.nearest(held.rows))
                    self.report.nearest[name] = "no calibration input reached it"
                self.store(path)
                self.close(path)
        if "" not in done:
            self.store("")
        self._assemble(config)

    def _assemble(self, config: QuantConfig) -> None:
        index: dict[str, str] = {}
        state: dict[str, Tensor] = {}
        total = 0
        for number in self.numbers.values():
            name = weight_file(number)
            with safe_open(self.work / name, framework="pt") as file:
                index.update(dict.fromkeys(file.keys(), name))
            total += (self.work / name).stat().st_size
            with safe_open(self.work / state_file(number), framework="pt") as file:
                state.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        save_quant_state(self.work, state, config)
        for file in self.weights.directory.iterdir():
            if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(".index.json"):
                shutil.copyfile(file, self.work / file.name)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (self.work / INDEX).write_text(f"{text}\n", encoding="utf-8")


def weight_file(number: int) -> str:
    """Name of the file with a block's weights."""
    return f"model-block-{number:05d}.safetensors"


def state_file(number: int) -> str:
    """Name of the file with the state of a block's quantizers."""
    return f"{STATE}{number:05d}.bin"


def _written(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a file of tensors, whole or not at all; its size."""
    temporary = path.with_name(f"{path.name}.tmp")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
    flush(temporary)
    os.replace(temporary, path)
    return path.stat().st_size


def real_buffers(model: nn.Module) -> None:
    """Give a model on the meta device the buffers that no file holds, such as rotary frequencies."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    with init_empty_weights(include_buffers=False):
        made = type(model)(model.config)
    for name, module in made.named_modules():
        own = model.get_submodule(name)
        for leaf in module._non_persistent_buffers_set:
            if leaf in own._non_persistent_buffers_set:
                own._buffers[leaf] = module._buffers[leaf]
