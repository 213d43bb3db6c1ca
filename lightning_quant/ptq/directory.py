"""Post-training quantization of a model's directory, block by block, in bounded memory, to be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant.attach import attach, quantizers
from lightning_quant.bypass import evaluating
from lightning_quant.checkpoint import transformers_class
from lightning_quant.errors import CheckpointError, explain
from lightning_quant.export import ExportReport, export
from lightning_quant.export.atomic import Journal, fingerprint, flush
from lightning_quant.export.card import versions
from lightning_quant.export.streamed import INDEX, WHOLE, on_meta
from lightning_quant.ptq.disk import STATE, DiskKeeper, real_buffers
from lightning_quant.rounding.blockwise import check_layers, round_units, units
from lightning_quant.rounding.data import read_text, rows
from lightning_quant.rounding.methods import build_rounding
from lightning_quant.rounding.report import RoundingReport
from lightning_quant.spec import QuantConfig


def ptq(
    directory: str | Path,
    out: str | Path,
    config: QuantConfig,
    rounding: str = "gptq",
    *,
    data: str | Path | None = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    rounded: str | Path | None = None,
    resume: bool = False,
    format: str | None = None,
    target: str | None = None,
    max_shard_bytes: int = 2**30,
    **options: Any,
) -> tuple[RoundingReport, ExportReport]:
    """Round the float model of a directory and write the low-bit export.

    One block of weights is in memory at a time, beside what is in no block (embeddings, the head) and what the
    samples are at the current block: samples x length x width numbers, twice for roundings that compare with the
    float model.  Each finished block is written at once, to a directory beside ``out``; with ``resume`` an
    interrupted run goes on after the last of them, and what comes out is the same, byte for byte.

    Args:
        directory: transformers' config.json and safetensors, with a tokenizer if there is one.
        out: A directory that does not exist yet.
        config: What to quantize and how.
        rounding: Name in ``ROUNDINGS``.
        data: A text file; None: see ``data.read_text``.
        samples: Rows of tokens to calibrate with.
        length: Tokens in each.
        seed: Of what is drawn.
        rounded: Keep the rounded model there, as a training directory: to verify against, or to train on.
        resume: Go on from what an interrupted run left.
        format: Of the export.
        target: Runtime it is for.
        max_shard_bytes: Largest file of the export.
        options: Of the rounding.

    Returns:
        What was rounded, and what was written.

    Raises:
        ValueError: Unknown names, too little text, or layers that cannot be rounded so.
        CheckpointError: The directory is none of a float model, or ``resume`` finds another run's blocks.
        FileExistsError: ``out`` or ``rounded`` exists.
        OSError: The disk is full, or another process rounds there.
    """
    directory, out = Path(directory), Path(out)
    rule, report = build_rounding(rounding, options), RoundingReport(rounding)
    for path in (out, *((Path(rounded),) if rounded is not None else ())):
        if path.exists():
            cure = "Choose another, or remove it."
            raise FileExistsError(explain(str(path), "a directory that does not exist yet", "an existing one", cure))
    _check_float(directory)
    tokenizer, text = _tokenizer(directory), read_text(data)
    plain = json.loads(json.dumps(config.to_dict()))  # as a journal reads it
    settings = {"config": plain, "rounding": rounding, "options": options, "seed": seed}
    sizes = {"samples": samples, "length": length, "text": hashlib.sha256(text.encode()).hexdigest()}
    work = out.with_name(f".{out.name}.rounding")
    made_of = fingerprint(directory, **settings, **sizes, **versions())
    journal = Journal(out.with_name(f".{out.name}.rounding.json"), made_of)
    with _working(work, journal, resume):
        model: Any = on_meta(directory)
        attach(model, config, fit=False)
        check_layers(model, report)
        real_buffers(model)
        batches = rows(text, tokenizer, int(model.get_input_embeddings().num_embeddings), samples, length)
        with evaluating(model), torch.no_grad():
            _rounded(model, config, batches, rule, report, seed, work, journal)
        del model
        written = export(
            work,
            out,
            format,
            target,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_bytes,
        )
        if rounded is not None:
            for file in work.glob(f"{STATE}*"):
                file.unlink()
            os.replace(work, rounded)
    return report, written


def _rounded(
    model: nn.Module,
    config: QuantConfig,
    batches: list[Any],
    rule: Any,
    report: RoundingReport,
    seed: int,
    work: Path,
    journal: Journal,
) -> None:
    paths = units(model)
    if not paths:
        cure = "Load it, and call round_model and export."
        raise ValueError(explain(type(model).__name__, "a model of repeated blocks", "one of one piece", cure))
    keeper = DiskKeeper(model, paths, work, journal, report)
    if not keeper.is_finished:
        keeper.open_outside()
        round_units(model, batches, rule, report, seed=seed, paths=paths, keeper=keeper)
    for path, q in quantizers(model):
        if not (q.ready or q.is_weight or keeper.is_finished):
            cure = "Load the model, and call round_model and export; or use dynamic ranges."
            raise ValueError(explain(path, "a range that its block calibrates", "none", cure))
    keeper.finish(config)


def _check_float(directory: Path) -> None:
    _, own = transformers_class(directory)
    if getattr(own, "quantization_config", None) is not None:
        got, cure = "one that is quantized already", "Point at the float model."
        raise CheckpointError(explain(str(directory), "a float model", got, cure))
    if not ((directory / WHOLE).is_file() or (directory / INDEX).is_file()):
        cure = "Save it with save_pretrained, which writes safetensors."
        raise CheckpointError(explain(str(directory), f"{WHOLE} or {INDEX}", "neither", cure))


def _tokenizer(directory: Path) -> Any:
    """The one beside the weights, or None."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(directory)


@contextmanager
def _working(work: Path, journal: Journal, resume: bool) -> Iterator[None]:
    """A directory of this process alone, which is gone once the block ends well, and kept if it fails with resume."""
    import fcntl

    work.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            cure = "Wait for it, or choose another directory."
            raise OSError(explain(str(work), "no other process rounding there", "one that is", cure)) from error
        if resume:
            journal.read()
        else:
            journal.path.unlink(missing_ok=True)
            for entry in work.iterdir():
                entry.unlink()
        try:
            yield
        except BaseException:
            if not resume:
                shutil.rmtree(work, ignore_errors=True)
                journal.path.unlink(missing_ok=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        journal.path.unlink(missing_ok=True)
        flush(work.parent)
    finally:
        os.close(lock)
