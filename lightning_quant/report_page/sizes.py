"""Bytes of an export's tensors, read off its files' headers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.gguf import MODEL_FILE

LONGEST = 10**8  # bytes of a header that safetensors accepts


def stored_tensors(export: Path) -> dict[str, tuple[int, list[int]]]:
    """Bytes and shape of every tensor, by the name it is stored under; empty for ONNX.

    Raises:
        CheckpointError: A file is damaged.
    """
    found: dict[str, tuple[int, list[int]]] = {}
    for file in sorted(export.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                table: dict[str, Any] = json.loads(stream.read(min(length, LONGEST)))
            for name, entry in table.items():
                if name != "__metadata__":
                    first, end = entry["data_offsets"]
                    found[name] = (int(end) - int(first), [int(n) for n in entry["shape"]])
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                explain(str(file), "a safetensors file", f"{error!r:.200}", "Export again.")
            ) from error
    if (export / MODEL_FILE).is_file():
        from lightning_quant.export.verify_gguf import read_gguf

        _, tensors = read_gguf(export / MODEL_FILE)
        found = {name: (int(t.n_bytes), [int(n) for n in t.shape]) for name, t in tensors.items()}
    return found


def weight_bytes(export: Path) -> int:
    """Bytes of all tensors; of ONNX those of its files."""
    tensors = stored_tensors(export)
    if tensors:
        return sum(size for size, _ in tensors.values())
    return sum(file.stat().st_size for file in export.glob("*.onnx*"))


def of_layers(tensors: Mapping[str, tuple[int, list[int]]], paths: Iterable[str]) -> dict[str, int]:
    """Bytes of what belongs to each path on disk, biases left out; paths that hold nothing are left out."""
    known = set(paths)
    found: dict[str, int] = {}
    for name, (size, _) in tensors.items():
        owner = name
        while owner and owner not in known:
            owner = owner.rpartition(".")[0]
        if owner and not name.endswith(".bias"):
            found[owner] = found.get(owner, 0) + size
    return found
