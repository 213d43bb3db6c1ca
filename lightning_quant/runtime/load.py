"""From a compressed-tensors directory to a transformers model that computes with its integers.

The model is built without memory, then filled shard by shard; a quantized layer is replaced as soon as its tensors are
read, so the peak is the low-bit model plus one layer.  Nothing in the directory is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.progress import track
from lightning_quant.runtime.checkpoint import Checkpoint
from lightning_quant.runtime.choose import build, choose
from lightning_quant.runtime.report import Line, Plan


@dataclass(frozen=True)
class _Place:
    """Where tensors of the file belong.

    Attributes:
        name: Of the model's tensor.
        source: Of the file's tensor, or path of the file's quantized layer.
        quantized: Which of the two.
        rows: Rows of the model's tensor (its dimensions but the last flattened) that the source fills; None: all.
    """

    name: str
    source: str
    quantized: bool
    rows: Tensor | None = None


def load(path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None) -> nn.Module:
    """Read an export for fast inference.

    Linear layers whose grid a kernel has become low-bit layers; others are dequantized.  ``model.runtime_report``, a
    ``Plan``, says which and why.  The model is in evaluation mode, for inference only, and stays on its device.

    Args:
        path: A directory in the compressed-tensors format, sharded or not.
        dtype: Of activations and dense tensors; the int4 and int8 kernels have bfloat16 only.
        device: Where to; None: the CPU.

    Returns:
        The transformers model that config.json names.

    Raises:
        CheckpointError: A file or tensor is missing or damaged.
        ValueError: Another format, or a grid that no layer here computes.
    """
    checkpoint, device = Checkpoint(path), torch.device(device or "cpu")
    model = _empty(checkpoint, dtype, device)
    places = sorted(_places(checkpoint, model), key=lambda p: _file(checkpoint, p))
    lines = []
    for place in track(places, "loading weights"):
        if place.quantized:
            lines.append(_line(checkpoint, place, dtype, device))
        _fill(checkpoint, model, place, lines[-1].kernel if place.quantized else "", dtype, device)
    model.tie_weights()
    _check_filled(checkpoint, model, places)
    model.runtime_report = Plan(tuple(lines))  # type: ignore[assignment]
    model.eval()
    whole: nn.Module = model
    return whole


def plan(path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None) -> Plan:
    """What ``load`` would run on which kernel; reads config.json and the files' headers only.

    Args:
        path: As for ``load``.
        dtype: As for ``load``.
        device: As for ``load``.

    Raises:
        CheckpointError: See ``load``.
        ValueError: See ``load``.
    """
    checkpoint, device = Checkpoint(path), torch.device(device or "cpu")
    model = _empty(checkpoint, dtype, device)
    return Plan(tuple(_line(checkpoint, p, dtype, device) for p in _places(checkpoint, model) if p.quantized))


def _empty(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with parameters that have no memory, and the buffers that no file holds."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    del config.quantization_config
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        cure = "Write its name into config.json."
        raise ValueError(explain(f"{checkpoint.path}: architectures", "a class of transformers", repr(name), cure))
    with torch.device("meta"):
        model: Any = kind._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
    kept = model.state_dict(keep_vars=True)
    for path, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if (f"{path}.{leaf}" if path else leaf) not in kept:
                setattr(module, leaf, torch.empty_like(buffer, device=device))
    for tensor in kept.values():
        tensor._is_hf_initialized = True  # so that only the other buffers are computed
    model.initialize_weights()
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.path)
    return model


def _places(checkpoint: Checkpoint, model: Any) -> Iterator[_Place]:
    """Which of the file's tensors fill which of the model's."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        path = name.removesuffix(".weight")
        if path != name and checkpoint.parts(path):
            yield _Place(name, path, True)
        elif name in checkpoint:
            yield _Place(name, name, False)
        else:
            yield from _converted(checkpoint, model, name, tensor)


def _converted(checkpoint: Checkpoint, model: Any, name: str, tensor: Tensor) -> Iterator[_Place]:
    """As ``_places``, for a tensor that has another name on disk, or is several there, such as experts.

    transformers knows how to cut it; row numbers that are cut the same way tell where each part goes.
    """
    from transformers.core_model_loading import revert_weight_conversion

    rows = torch.arange(tensor[..., 0].numel() if tensor.ndim > 1 else tensor.numel())
    numbers = rows.view(*tensor.shape[:-1], 1) if tensor.ndim > 1 else rows
    for source, part in revert_weight_conversion(model, {name: numbers}).items():
        path = source.removesuffix(".weight")
        if tensor.ndim > 1 and checkpoint.parts(path):
            yield _Place(name, path, True, part.flatten())
        elif source in checkpoint:
            yield _Place(name, source, False, part.flatten())


def _file(checkpoint: Checkpoint, place: _Place) -> str:
    return checkpoint.file(f"{place.source}.weight_scale" if place.quantized else place.source)


def _line(checkpoint: Checkpoint, place: _Place, dtype: torch.dtype, device: torch.device) -> Line:
    kind = checkpoint.kind(place.source)
    if place.rows is not None:
        if kind.rounds_inputs:
            expected, cure = "experts with float inputs", "Load it with from_pretrained."
            raise ValueError(explain(f"{checkpoint.path}: {place.source}", expected, "rounded ones", cure))
        return Line(place.source, "dense", "a part of a weight that the model holds fused")
    return Line(place.source, *choose(kind, dtype, device))


def _fill(
    checkpoint: Checkpoint, model: Any, place: _Place, kernel: str, dtype: torch.dtype, device: torch.device
) -> None:
    path, _, leaf = place.name.rpartition(".")
    owner = model.get_submodule(path)
    if place.quantized and place.rows is None:
        if type(owner) is not nn.Linear:
            expected, cure = "integers of a Linear layer", "Load it with from_pretrained."
            raise ValueError(explain(f"{checkpoint.path}: {path}", expected, type(owner).__name__, cure))
        layer = build(kernel, checkpoint.stored(place.source), dtype, device)
        model.set_submodule(path, layer)
        return
    if path and not isinstance(owner._parameters.get(leaf, owner._buffers.get(leaf)), Tensor):
        return  # the bias of a layer that took it along
    old = getattr(owner, leaf)
    value = checkpoint.stored(place.source).dense(dtype) if place.quantized else checkpoint.tensor(place.source)
    value = value.to(device=device, dtype=old.dtype)
    if place.rows is not None:
        whole = torch.empty_like(old, device=device) if old.is_meta else old.detach()
        flat = whole.flatten(0, -2) if whole.ndim > 1 else whole
        flat[place.rows.to(device)] = value
        value = whole
    elif value.shape != old.shape:
        cure = "The files do not belong together: export again."
        got = tuple(value.shape)
        raise CheckpointError(explain(f"{checkpoint.path}: {place.source}", f"shape {tuple(old.shape)}", got, cure))
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _check_filled(checkpoint: Checkpoint, model: Any, places: list[_Place]) -> None:
    """Refuse a model with tensors that no file had, and a file with tensors that no model has."""
    empty = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if empty:
        cure = "Export again, or fetch the missing file."
        raise CheckpointError(explain(str(checkpoint.path), f"a tensor for {empty[0]}", "none", cure))
    used = {p.source for p in places if not p.quantized}
    for place in places:
        if place.quantized:
            used.update((*checkpoint.parts(place.source), f"{place.source}.bias"))
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq"]
    left = [n for n in checkpoint.names() if n not in used and not any(re.search(p, n) for p in ignored)]
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    left = [n for n in left if n not in tied]
    if left:
        cure = "Load it with from_pretrained."
        raise CheckpointError(explain(str(checkpoint.path), f"tensors of {type(model).__name__}", left[0], cure))
