"""Write a trained model in a format other software loads, and prove that it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant import distributed, zero
from lightning_quant.attach import is_attached, quantizers
from lightning_quant.checkpoint import (
    ADAPTER_FILE,
    STATE_FILE,
    adapters_base,
    load_quant_config,
    load_training_checkpoint,
)
from lightning_quant.errors import explain, unknown
from lightning_quant.export.atomic import fingerprint, journal_of, new_directory, write_sums
from lightning_quant.export.card import CARD_FILE, model_card, versions
from lightning_quant.export.formats import FORMATS, Format
from lightning_quant.export.integer_only import Comparison, IntegerRun, compare_with_runtime, run_integer_only
from lightning_quant.export.streamed import open_training_directory
from lightning_quant.export.verdict import LayerCheck, VerifyReport
from lightning_quant.export.verify import verify
from lightning_quant.export.writer import ExportReport, Sink, as_shipped, shipped_model
from lightning_quant.spec import QuantConfig
from lightning_quant.targets import TARGETS


def export(
    model: nn.Module | str | Path,
    path: str | Path,
    format: str | None = None,
    target: str | None = None,
    tokenizer: Any = None,
    config: QuantConfig | None = None,
    max_shard_bytes: int = 2**30,
    inputs: Any = None,
    resume: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Write the low-bit model with the integers and scales that training used.

    The directory appears complete or not at all, with the digests of its files in SHA256SUMS.  Of a training directory
    one weight is in memory at a time, whatever the model's size; of a model, one encoded tensor beside it.  In a
    process group every rank calls this and the first one writes.

    Args:
        model: A model with quantizers (or a module that holds one, such as a LightningModule); LoRA adapters beside
            them are merged in what is written, and stay as they are here.  Or a training directory.
        path: A directory that does not exist yet.
        format: Name in ``FORMATS``; None: the one that the target reads; folded for a model that is not
            transformers', unless that is onnx.
        target: Runtime the export is for; must be the one training followed where that matters.  None: that one.
        tokenizer: Saved beside the weights if given.
        config: Written beside the weights, for ``verify``; None: a training directory's own.
        max_shard_bytes: Largest shard, in bytes.
        inputs: Example inputs for a format that traces the model (onnx), whose first dimension is the batch: a tensor,
            a tuple or a mapping of arguments; None: the ``example_input_array`` of a LightningModule.
        resume: Of a training directory: go on from the shards that an interrupted export to the same path finished.
            The files are those of an export that nothing interrupted.  Formats of one file start over.
        overwrite: Replace an export that exists, once the new one is complete.

    Returns:
        What was written.

    Raises:
        ValueError: Unknown format, no quantizers, or a model the format cannot express.
        FileExistsError: ``path`` exists.
        CheckpointError: The training directory, or with ``resume`` what was left behind, is not what it must be.
        OSError: The disk is full, or another process exports there.
    """
    path = Path(path)
    _check_place(path, overwrite, None if isinstance(model, nn.Module) else Path(model))
    journal, training = None, None
    if isinstance(model, nn.Module):
        if resume:
            expected, cure = "a training directory to go on from", "Export the directory, or without resume."
            raise ValueError(explain("export(resume=True)", expected, "a model in memory", cure))
    else:
        training = Path(model)
        config = load_quant_config(training) if config is None else config
        model = _opened(training, format, target)
    model = shipped_model(model)
    format = _format(model, format, target)
    if not is_attached(model):
        raise ValueError(
            explain(
                "export", "a model with quantizers", "a float model", "Export before detach(), from the trained model."
            )
        )
    if training is not None:
        journal = journal_of(path, _made_of(training, format, target, max_shard_bytes))
    directory = new_directory(path, overwrite, journal, resume)
    with zero.gathered(model.parameters()), directory as temporary, as_shipped(model):
        sink = Sink(temporary, max_shard_bytes, journal)
        FORMATS[format].write(model, sink, target=target, tokenizer=tokenizer, config=config, inputs=inputs)
        sink.finish()
        report = ExportReport(path, format, sink.total_bytes, sink.float_bytes, sink.files)
        if hasattr(model, "save_pretrained"):
            sink.text(CARD_FILE, model_card(model, report, config, training))
        if sink.writes:
            write_sums(temporary, sink.digests)
    distributed.barrier()
    return report


def _opened(training: Path, format: str | None, target: str | None) -> nn.Module:
    """The model of a training directory, its weights on disk if the format reads them one by one."""
    model = open_training_directory(training)
    if model is not None and FORMATS[_format(shipped_model(model), format, target)].streams:
        return model
    return load_training_checkpoint(training)


def _made_of(training: Path, format: str, target: str | None, max_shard_bytes: int) -> dict[str, Any]:
    directories = [training]
    if (training / ADAPTER_FILE).is_file() and (base := Path(adapters_base(training))).is_dir():
        directories.append(base)
    settings = {"format": format, "target": target, "max_shard_bytes": max_shard_bytes}
    return fingerprint(*directories, **settings, **versions())


def _check_place(path: Path, overwrite: bool, training: Path | None) -> None:
    """Refuse to put something else than an export aside."""
    if not overwrite or not path.exists():
        return
    exported = path.is_dir() and any(format.holds(path) for format in FORMATS.values())
    inside = training is not None and path.resolve() in (training.resolve(), *training.resolve().parents)
    if inside or not exported or (path / STATE_FILE).exists():
        expected, cure = "an export to overwrite", "Choose another directory, or remove it."
        raise FileExistsError(explain(str(path), expected, "another directory or a file", cure))


def check_export(model: nn.Module, format: str | None = None) -> None:
    """Refuse, before training, what ``export`` would refuse after it; formats that trace the model are not tried.

    Args:
        model: A model with quantizers.
        format: As ``export`` takes it.

    Raises:
        ValueError: The format cannot express the model.
    """
    model = shipped_model(model)
    FORMATS[_format(model, format, None)].check(model)


def _format(model: nn.Module, format: str | None, target: str | None) -> str:
    if target is not None and target not in TARGETS:
        raise ValueError(unknown("target", target, TARGETS, "export"))
    if format is None:
        if target is None:  # the one that training followed
            target = next((q.target for _, q in quantizers(model)), "vllm")
        format = TARGETS[target].format
        return format if hasattr(model, "save_pretrained") or format == "onnx" else "folded"
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
