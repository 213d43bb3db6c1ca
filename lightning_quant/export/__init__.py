"""Write a trained model in a format other software loads, and prove that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant import distributed
from lightning_quant.attach import is_attached
from lightning_quant.errors import explain, unknown
from lightning_quant.export.compressed_tensors import write_compressed_tensors
from lightning_quant.export.folded import write_folded
from lightning_quant.export.verify import LayerCheck, VerifyReport, verify
from lightning_quant.export.writer import ExportReport, Sink, new_directory
from lightning_quant.spec import QuantConfig

FORMATS: dict[str, Callable[..., None]] = {
    "compressed-tensors": write_compressed_tensors,
    "folded": write_folded,
}


def export(
    model: nn.Module,
    path: str | Path,
    format: str | None = None,
    target: str | None = None,
    tokenizer: Any = None,
    config: QuantConfig | None = None,
    max_shard_bytes: int = 2**30,
) -> ExportReport:
    """Write the low-bit model with the integers and scales that training used.

    Shards are written one by one, so memory grows by one shard; the directory appears complete or not at
    all.  In a process group every rank calls this and the first one writes.

    Args:
        model: A model with quantizers (or a module that holds one, such as a LightningModule).
        path: A directory that does not exist yet.
        format: Name in ``FORMATS``; None: compressed-tensors for a transformers model, else folded.
        target: Runtime the export is for; must be the one training followed where that matters.
        tokenizer: Saved beside the weights if given.
        config: Written beside the weights, for ``verify``.
        max_shard_bytes: Largest shard, in bytes.

    Returns:
        What was written.

    Raises:
        ValueError: Unknown format, no quantizers, or a model the format cannot express.
        FileExistsError: ``path`` exists.
    """
    path = Path(path)
    model = _inner(model)
    if format is None:
        format = "compressed-tensors" if hasattr(model, "save_pretrained") else "folded"
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS, "export"))
    if not is_attached(model):
        raise ValueError(
            explain(
                "export", "a model with quantizers", "a float model", "Export before detach(), from the trained model."
            )
        )
    with new_directory(path) as temporary:
        sink = Sink(temporary, max_shard_bytes)
        FORMATS[format](model, sink, target=target, tokenizer=tokenizer, config=config)
        sink.finish()
    distributed.barrier()
    return ExportReport(path, format, sink.total_bytes, sink.float_bytes, sink.files)


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside a module that only wraps it, else the module itself."""
    if hasattr(model, "save_pretrained"):
        return model
    inner = [m for m in model.children() if hasattr(m, "save_pretrained")]
    held = sum(p.numel() for p in model.parameters())
    if len(inner) == 1 and sum(p.numel() for p in inner[0].parameters()) == held:
        return inner[0]
    return model


__all__ = ["FORMATS", "ExportReport", "LayerCheck", "VerifyReport", "export", "verify"]
