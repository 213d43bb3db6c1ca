"""What a model is traced with for ONNX, and which dimensions of it stay free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain

DRAWN = (3, 8)  # samples and tokens to trace with; ``verify`` draws others, so that free dimensions are seen to be free


def example_inputs(
    model: nn.Module, inputs: Any, drawn: tuple[int, int] = DRAWN
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments to trace a model with, of at least two samples.

    One sample would be repeated: tracing takes a dimension of 1 for a constant, and two that are equal for one.

    Args:
        model: A LightningModule's ``example_input_array`` stands in for missing inputs, and so do tokens or images
            drawn for a model of transformers.
        inputs: One tensor, a tuple or list (positional), a mapping (keywords), or None.
        drawn: Samples and tokens to draw.

    Raises:
        ValueError: None, or tensors that do not share their first dimension.
    """
    if inputs is None:
        inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        inputs = drawn_inputs(model, *drawn)
    if inputs is None:
        cure = "Pass inputs=, a tensor, tuple or mapping as forward takes it, or set example_input_array."
        raise ValueError(explain("format='onnx'", "example inputs to trace the model with", "none", cure))
    args, kwargs = arguments(inputs)
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    sizes = {len(t) if t.ndim else 0 for t in tensors}
    if len(sizes) != 1 or 0 in sizes:
        got = f"shapes {[tuple(t.shape) for t in tensors]}"
        raise ValueError(explain("inputs", "tensors whose first dimension is one batch", got, "Pass such inputs."))
    texts = [t for t in tensors if is_text(model, t)]
    short = any(t.shape[1] == 1 for t in texts)
    lengths = {t.shape[1] * (1 + short) for t in texts}
    rows, times = sizes.pop(), 1
    while rows * times == 1 or rows * times in lengths:
        times += 1

    def prepare(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        if short and is_text(model, value):
            value = torch.cat([value, value], 1)
        return torch.cat([value] * times)

    return tuple(prepare(v) for v in args), {k: prepare(v) for k, v in kwargs.items()}


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, tuple, list or mapping as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def drawn_inputs(model: nn.Module, rows: int, length: int) -> dict[str, Tensor] | None:
    """Tokens, the last sample's padded, or images for a model of transformers; None for what reads something else.

    Args:
        model: The model.
        rows: Samples.
        length: Tokens of each, fewer where the model has no positions for so many.
    """
    config: Any = getattr(model, "config", None)
    reads = getattr(model, "main_input_name", None)
    draw = torch.Generator().manual_seed(0)
    if reads == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {reads: torch.randn(rows, config.num_channels, height, width, generator=draw)}
    if reads != "input_ids" or not hasattr(config, "get_text_config"):
        return None
    text = config.get_text_config()
    length = min(length, getattr(text, "max_position_embeddings", length))
    ids = torch.randint(0, text.vocab_size, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[-1, -(-length * 3 // 4) :] = 0
    more = {"decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def is_text(model: nn.Module, value: Any) -> bool:
    """Whether an argument holds a number for each token, so that its second dimension is free too."""
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.ndim == 2
    return whole and hasattr(model, "save_pretrained")


def free_dimensions(model: nn.Module, named: Mapping[str, Any]) -> dict[str, Any]:
    """Names of the free dimensions of every argument: the batch, and of text the number of tokens.

    Args:
        model: The model.
        named: Arguments by the names that ``forward`` has for them; those it takes as ``**kwargs`` in a mapping.
    """
    free: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, Mapping):
            free[name] = free_dimensions(model, value)
        elif not isinstance(value, Tensor):
            free[name] = None
        else:
            side = "decoder_" if name.startswith("decoder_") else ""
            free[name] = {0: "batch", 1: f"{side}sequence"} if is_text(model, value) else {0: "batch"}
    return free
