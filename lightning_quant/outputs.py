"""What forwards take and return, as distillation reads it: logits, loss and hidden states, and positions that count.

Models of transformers are told by what they are made of, so that transformers need not be installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain

IGNORED = -100
NEXT_TOKEN = (None, "ForCausalLM", "ForConditionalGeneration")  # transformers' loss_type of models that shift labels


def places_of(output: Any) -> tuple[Any, Any] | None:
    """Keys of the logits and of the loss in what a forward returned; of logits that stand alone the key is None."""
    if isinstance(output, Tensor):
        return (None, None) if output.ndim > 1 and output.is_floating_point() else None
    if isinstance(output, MutableMapping):
        logits, loss = output.get("logits"), output.get("loss")
        return ("logits", "loss" if isinstance(loss, Tensor) else None) if isinstance(logits, Tensor) else None
    if isinstance(output, (tuple, list)):
        found = {i: t.ndim for i, t in enumerate(output) if isinstance(t, Tensor) and t.is_floating_point()}
        first = next((i for i, ndim in found.items() if ndim > 1), None)
        return None if first is None else (first, next((i for i, ndim in found.items() if ndim == 0), None))
    return None


def replaced(output: Any, places: tuple[Any, Any], joined: Sequence[Tensor]) -> Any:
    """The output with the joined logits and loss in their places."""
    if places[0] is None:
        return joined[0]
    new = dict(zip((key for key in places if key is not None), joined, strict=False))
    if isinstance(output, MutableMapping):
        for key, value in new.items():
            output[key] = value
        return output
    items = [new.get(i, item) for i, item in enumerate(output)]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def hidden_states(output: Any) -> list[Tensor]:
    """The hidden states a forward returned."""
    states = output.get("hidden_states") if isinstance(output, Mapping) else None
    if not states:
        cure = "Leave out hidden, or let the forward return them under that name."
        raise ValueError(explain("Distill.hidden", "hidden_states in what the forward returns", describe(output), cure))
    return list(states)


def describe(output: Any) -> str:
    """In words, for messages."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"{type(output).__name__} of {sorted(output)}" if isinstance(output, Mapping) else type(output).__name__


def shares(module: nn.Module, kwargs: Mapping[str, Any], z: Tensor) -> Tensor:
    """What each position counts, the shape of z less its last dimension; they add up to 1."""
    shape = z.shape[:-1]
    labels, attended = kwargs.get("labels"), kwargs.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape:
        counts = labels != IGNORED
        if counts.ndim > 1 and _shifts_labels(module):
            counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], 1)
    elif isinstance(attended, Tensor) and attended.shape == shape:
        counts = attended != 0
    else:
        counts = torch.ones(shape, device=z.device)
    counts = counts.to(z.device, torch.promote_types(z.dtype, torch.float32))
    return counts / counts.sum().clamp(min=1)


def _shifts_labels(module: nn.Module) -> bool:
    """Whether the label of a position is the next one's, which transformers' own losses see to."""
    model = _transformer(module)
    return model is not None and model.loss_type in NEXT_TOKEN and not _reads_labels(model)


def _reads_labels(model: Any) -> bool:
    """Whether a forward makes its decoder's inputs from labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _transformer(module: nn.Module) -> Any:
    """The model of transformers that a module is or holds."""
    return next((m for m in module.modules() if hasattr(m, "loss_type") and hasattr(m, "config")), None)


def without_labels(teacher: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward that computes no loss, which would take as much memory as the model's own."""
    named = inspect.signature(type(teacher).forward).parameters.get("labels")
    needed = named is not None and named.default is inspect.Parameter.empty
    if needed or (_reads_labels(_transformer(teacher)) and kwargs.get("decoder_input_ids") is None):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != "labels"}
