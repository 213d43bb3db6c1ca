"""Prove that an export computes what training computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_quant.adapters import acting_beside
from lightning_quant.attach import quant_layers
from lightning_quant.checkpoint import load_training_checkpoint
from lightning_quant.export.atomic import SUMS, check_sums
from lightning_quant.export.formats import format_of
from lightning_quant.export.streamed import open_training_directory
from lightning_quant.export.verdict import VerifyReport
from lightning_quant.export.writer import as_shipped, shipped_model


def verify(
    path: str | Path,
    model_or_training_dir: nn.Module | str | Path,
    inputs: Any = None,
    tolerance: float | None = None,
    logits: bool = True,
) -> VerifyReport:
    """Compare an export, through its real reader, with the model that was trained.

    First its files with SHA256SUMS, then integers, scales and float tensors one by one, then the outputs.

    Args:
        path: The export.
        model_or_training_dir: The trained model with its quantizers, or a training directory.
        inputs: Keyword inputs of the model (onnx: as ``export`` takes them); None: 2 x 32 token ids drawn with a fixed
            seed (onnx: ``example_input_array``).
        tolerance: Largest logit difference that counts as equal; None: what the format's reader causes itself, 0 for
            those that are exact in float32.
        logits: Run both models.  Without, and given a training directory, one tensor is in memory at a time.

    Returns:
        The comparison; ``.ok`` is the verdict.

    Raises:
        CheckpointError: Either side is missing, damaged or not what it claims to be.
    """
    path = Path(path)
    format = format_of(path)
    changed = check_sums(path)
    compare = format.opened(path)
    if isinstance(model_or_training_dir, nn.Module):
        trained = model_or_training_dir
    else:
        lazy = None if logits else open_training_directory(model_or_training_dir)
        trained = load_training_checkpoint(model_or_training_dir) if lazy is None else lazy
    trained = shipped_model(trained)
    beside = [p for p, _ in acting_beside(trained, {id(layer) for _, layer in quant_layers(trained)})]
    with as_shipped(trained):
        report = compare(trained, inputs, tolerance, logits)
    report.other.extend(changed or [])
    if changed is None:
        report.notes.append(f"no {SUMS}, from an older release: whether its files are whole is seen by what they hold")
    if beside:
        got = "on both sides; while training they add after its product, which sums floats in another order"
        report.notes.append(f"adapters of {beside[0]} (of {len(beside)} layers in float) are merged {got}")
    return report
