"""Where formats put their tensors: safetensors files that are written as the tensors come.

A file of safetensors begins with a table of all its tensors, and those of wide elements come first, so that each is
aligned.  A shard is therefore collected in one file per element size, on disk, and put together when it is full: memory
holds one tensor, whatever the size of the shard.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.export.atomic import BLOCK, Journal, flush
from lightning_quant.export.streamed import DTYPES
from lightning_quant.export.weights import float_tensors, item_count
from lightning_quant.layers import QuantLayer
from lightning_quant.progress import track

NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class Sink:
    """Takes named tensors, writes them into shards, and their index.

    Args:
        directory: Where to write.
        max_shard_bytes: A shard is closed before it grows beyond this.
        journal: Where finished shards are noted; those in it already are there, and their tensors are passed over.
    """

    def __init__(self, directory: Path, max_shard_bytes: int, journal: Journal | None = None) -> None:
        self.directory, self.max_shard_bytes, self.journal = directory, max_shard_bytes, journal
        self.writes = distributed.rank() == 0
        self.files: list[str] = []
        self.digests: dict[str, str] = {}
        self.metadata = {"format": "pt"}  # in the header of every shard
        self._done: list[dict[str, Any]] = list(journal.shards) if journal is not None else []
        last = self._done[-1] if self._done else {}
        self.total_bytes: int = last.get("total_bytes", 0)
        self.float_bytes: int = last.get("float_bytes", 0)
        self._item: int = last.get("item", 0)  # of ``weights``, whose tensors are being added
        self._pass_over: int = last.get("added", 0)  # tensors of that one that finished shards hold
        self._added = 0
        self._open: _Shard | None = None

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor, QuantLayer | None]]:
        """The model's ``float_tensors`` that finished shards do not hold, with a progress bar."""
        first = self._item
        for number, (name, tensor, layer) in enumerate(
            track(float_tensors(model, first), "writing weights", item_count(model) - first), first
        ):
            if number > first:
                self._pass_over = 0
            self._item, self._added = number, 0
            yield name, tensor, layer
            del tensor
        self._pass_over = 0

    def add(self, name: str, tensor: Tensor, float_bytes: int | None = None) -> None:
        """Take one tensor.

        Args:
            name: Its key.
            tensor: Its value, whole.
            float_bytes: What it took in training; None: the same.
        """
        self._added += 1
        if self._added <= self._pass_over:
            return
        size = tensor.numel() * tensor.element_size()
        if self._open is not None and self._open.size + size > self.max_shard_bytes:
            self._close()
        if self._open is None:
            self._open = _Shard(self.directory / f"shard-{len(self._done)}", self.writes, self.metadata)
        self._open.add(name, tensor)
        self.total_bytes += size
        self.float_bytes += size if float_bytes is None else float_bytes

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
        self.text(name, json.dumps(data, indent=2) + "\n")

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        if self.writes:
            (self.directory / name).write_text(text, encoding="utf-8")

    def finish(self) -> None:
        """Close the last shard, give all their final names, write the index."""
        self._added = 0
        self._item += 1
        self._close()
        count = len(self._done)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        if self.writes:
            for i, name in enumerate(names):
                os.replace(self.directory / f"shard-{i}", self.directory / name)
        self.files += names
        self.digests = {name: shard["sha256"] for name, shard in zip(names, self._done, strict=True)}
        if count > 1:
            index = {key: name for name, shard in zip(names, self._done, strict=True) for key in shard["names"]}
            self.json(INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": index})

    def _close(self) -> None:
        """Finish the open shard; what is being added now goes into the next one."""
        if self._open is None:
            return
        shard = self._open.close()
        shard |= {"total_bytes": self.total_bytes, "float_bytes": self.float_bytes}
        shard |= {"item": self._item, "added": max(self._added - 1, 0)}
        self._done.append(shard)
        if self.journal is not None and self.writes:
            self.journal.add(shard)
        self._open = None


class _Shard:
    """A shard that is being collected."""

    def __init__(self, path: Path, writes: bool, metadata: dict[str, str]) -> None:
        self.path, self.writes, self.metadata = path, writes, metadata
        self.size = 0
        self.parts: dict[int, tuple[Path, BinaryIO]] = {}
        self.tensors: dict[int, list[tuple[str, str, list[int], int]]] = {}
        self.names: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        width, size = tensor.element_size(), tensor.numel() * tensor.element_size()
        self.names.append(name)
        self.size += size
        self.tensors.setdefault(width, []).append((name, NAMES[tensor.dtype], list(tensor.shape), size))
        if not self.writes:
            return
        if width not in self.parts:
            part = self.path.with_name(f"{self.path.name}.part{width}")
            self.parts[width] = part, part.open("wb")
        data = tensor.detach().cpu().contiguous()
        if size:
            self.parts[width][1].write(memoryview((ctypes.c_char * size).from_address(data.data_ptr())))

    def close(self) -> dict[str, Any]:
        """Put the parts together; the shard has its name once it is on the disk."""
        if not self.writes:
            return {"names": self.names, "size": self.size, "sha256": ""}
        table: dict[str, Any] = {"__metadata__": self.metadata}
        end = 0
        for width in sorted(self.tensors, reverse=True):
            for name, dtype, shape, size in self.tensors[width]:
                table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
                end += size
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        found = hashlib.sha256()
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("wb") as file:
            for block in self._blocks(len(header).to_bytes(8, "little") + header):
                found.update(block)
                file.write(block)
        flush(temporary)
        os.replace(temporary, self.path)
        for part, _ in self.parts.values():
            part.unlink()
        return {"names": self.names, "size": self.path.stat().st_size, "sha256": found.hexdigest()}

    def _blocks(self, header: bytes) -> Iterator[bytes]:
        yield header
        for width in sorted(self.parts, reverse=True):
            part, body = self.parts[width]
            body.close()
            with part.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    yield block
