"""The formats, each with what writes it, what refuses a model before training, and what reads it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export.compare import compare
from lightning_quant.export.compressed_tensors import (
    StoredCompressed,
    check_compressed_tensors,
    is_compressed,
    write_compressed_tensors,
)
from lightning_quant.export.folded import StoredFolded, check_folded, is_folded, write_folded
from lightning_quant.export.gguf import check_gguf, is_gguf, write_gguf
from lightning_quant.export.gptq import StoredGptq, check_gptq, is_gptq, write_gptq
from lightning_quant.export.onnx_qdq import check_onnx, is_onnx, write_onnx
from lightning_quant.export.stored import Stored
from lightning_quant.export.torchao import StoredTorchao, check_torchao, is_torchao, write_torchao
from lightning_quant.export.verdict import VerifyReport
from lightning_quant.export.verify_gguf import StoredGguf
from lightning_quant.export.verify_onnx import verify_onnx

Comparer = Callable[[nn.Module, Any, float | None, bool], VerifyReport]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        write: ``write(model, sink, target=, tokenizer=, config=, inputs=)``; checks the model before the first byte.
        check: ``check(model)``, before training, refuses a model that ``write`` would refuse after it.
        holds: Whether a directory holds such an export, seen from its files' names and config.json.
        opened: ``opened(path)`` reads an export so far that damage shows, and returns what compares it with a model:
            ``(trained, inputs, tolerance, logits) -> VerifyReport``.
        streams: Whether ``write`` reads weights by ``float_tensors`` alone, so that they may be on disk.
    """

    write: Callable[..., None]
    check: Callable[[nn.Module], None]
    holds: Callable[[Path], bool]
    opened: Callable[[Path], Comparer]
    streams: bool = True


def _through(kind: type[Stored]) -> Callable[[Path], Comparer]:
    return lambda path: partial(compare, kind(path))


FORMATS: dict[str, Format] = {
    "torchao": Format(write_torchao, check_torchao, is_torchao, _through(StoredTorchao)),
    "gptq": Format(write_gptq, check_gptq, is_gptq, _through(StoredGptq)),
    "compressed-tensors": Format(
        write_compressed_tensors, check_compressed_tensors, is_compressed, _through(StoredCompressed)
    ),
    "onnx": Format(write_onnx, check_onnx, is_onnx, lambda path: partial(verify_onnx, path), streams=False),
    "gguf": Format(write_gguf, check_gguf, is_gguf, _through(StoredGguf)),
    "folded": Format(write_folded, check_folded, is_folded, _through(StoredFolded)),
}


def format_of(path: Path) -> Format:
    """The format of an export.

    Raises:
        CheckpointError: It is none.
    """
    if not path.is_dir():
        raise CheckpointError(explain(str(path), "an export", "no such directory", "Point at what export() wrote."))
    for format in FORMATS.values():
        if format.holds(path):
            return format
    return FORMATS["folded"]  # which says what is missing
