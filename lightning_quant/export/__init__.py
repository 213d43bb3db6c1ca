"""Write a trained model in a format other software loads, and prove that it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant import distributed
from lightning_quant.attach import is_attached
from lightning_quant.errors import explain, unknown
from lightning_quant.export.formats import FORMATS, Format
from lightning_quant.export.integer_only import Comparison, IntegerRun, compare_with_runtime, run_integer_only
from lightning_quant.export.verdict import LayerCheck, VerifyReport
from lightning_quant.export.verify import verify
from lightning_quant.export.writer import ExportReport, Sink, as_shipped, new_directory, shipped_model
from lightning_quant.spec import QuantConfig


def export(
    model: nn.Module,
    path: str | Path,
    format: str | None = None,
    target: str | None = None,
    tokenizer: Any = None,
    config: QuantConfig | None = None,
    max_shard_bytes: int = 2**30,
    inputs: Any = None,
) -> ExportReport:
    """Write the low-bit model with the integers and scales that training used.

    Shards are written one by one, so memory grows by one shard; the directory appears complete or not at
    all.  In a process group every rank calls this and the first one writes.

    Args:
        model: A model with quantizers (or a module that holds one, such as a LightningModule); LoRA adapters beside
            them are merged in what is written, and stay as they are here.
        path: A directory that does not exist yet.
        format: Name in ``FORMATS``; None: compressed-tensors for a transformers model, else folded.
        target: Runtime the export is for; must be the one training followed where that matters.
        tokenizer: Saved beside the weights if given.
        config: Written beside the weights, for ``verify``.
        max_shard_bytes: Largest shard, in bytes.
        inputs: Example inputs for a format that traces the model (onnx), whose first dimension is the batch: a tensor,
            a tuple or a mapping of arguments; None: the ``example_input_array`` of a LightningModule.

    Returns:
        What was written.

    Raises:
        ValueError: Unknown format, no quantizers, or a model the format cannot express.
        FileExistsError: ``path`` exists.
    """
    path = Path(path)
    model = shipped_model(model)
    format = _format(model, format)
    if not is_attached(model):
        raise ValueError(
            explain(
                "export", "a model with quantizers", "a float model", "Export before detach(), from the trained model."
            )
        )
    with new_directory(path) as temporary, as_shipped(model):
        sink = Sink(temporary, max_shard_bytes)
        FORMATS[format].write(model, sink, target=target, tokenizer=tokenizer, config=config, inputs=inputs)
        sink.finish()
    distributed.barrier()
    return ExportReport(path, format, sink.total_bytes, sink.float_bytes, sink.files)


def check_export(model: nn.Module, format: str | None = None) -> None:
    """Refuse, before training, what ``export`` would refuse after it; formats that trace the model are not tried.

    Args:
        model: A model with quantizers.
        format: As ``export`` takes it.

    Raises:
        ValueError: The format cannot express the model.
    """
    model = shipped_model(model)
    FORMATS[_format(model, format)].check(model)


def _format(model: nn.Module, format: str | None) -> str:
    if format is None:
        return "compressed-tensors" if hasattr(model, "save_pretrained") else "folded"
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS, "export"))
    return format


__all__ = [
    "FORMATS",
    "Comparison",
    "ExportReport",
    "Format",
    "IntegerRun",
    "LayerCheck",
    "VerifyReport",
    "check_export",
    "compare_with_runtime",
    "export",
    "run_integer_only",
    "verify",
]
