"""A model of transformers without weights, and what it does while it reads a prompt and while it writes a token."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant.checkpoint import transformers_class
from lightning_quant.errors import explain
from lightning_quant.roofline.counting import Counted, count

TOKENS = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Load:
    """What is asked of a model.

    Attributes:
        batch: Sequences at a time.
        prompt: Tokens that are read at once, of each.
        context: Tokens before the one that is written, of each.
    """

    batch: int
    prompt: int
    context: int

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "context"):
            if getattr(self, name) < 1:
                raise ValueError(explain(f"roofline: {name}", "1 or more", getattr(self, name), "Raise it."))


def load_for(model: nn.Module, batch: int = 1, prompt: int | None = None, context: int | None = None) -> Load:
    """A load with defaults: 512 tokens of prompt and as many of context, or what the model has positions for.

    Args:
        model: Of transformers.
        batch: Sequences at a time.
        prompt: Tokens that are read at once.
        context: Tokens before the one that is written; None: as many as the prompt has.
    """
    limit = _positions(model) or TOKENS + 1
    prompt = prompt or min(TOKENS, limit)
    return Load(batch, prompt, context or max(min(prompt, limit - 1), 1))


def open_model(path: str | Path, dtype: str | None = None) -> nn.Module:
    """The model that a config.json describes, on the meta device; no weights are read.

    Args:
        path: A config.json, or a directory with one: a model, a training directory or an export.
        dtype: Of what is not quantized; None: the config's own, or bfloat16 where it has none.

    Raises:
        CheckpointError: There is no config.json of transformers.
    """
    kind, config = transformers_class(path)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the scheme says how the weights are stored
    own = config.dtype or torch.bfloat16
    with torch.device("meta"):
        model: nn.Module = kind._from_config(config, dtype=DTYPES[dtype] if dtype else own)
    return model.eval()


def count_phases(model: nn.Module, load: Load) -> dict[str, Counted]:
    """Count ``prefill``, the prompt at once, and ``decode``, one more token; the latter where there is a cache.

    Of the prompt's logits the last ones are computed, where the model can leave the others out, as serving does.

    Args:
        model: Of transformers, on the meta device, reading tokens.
        load: How much.

    Raises:
        ValueError: A model of another kind, or one that cannot be counted; too many tokens for it.
    """
    config: Any = model.config
    if config.is_encoder_decoder or model.main_input_name != "input_ids":
        got = "an encoder-decoder" if config.is_encoder_decoder else f"one that reads {model.main_input_name}"
        cure = "Count it with lightning_quant.roofline.count(model, inputs)."
        raise ValueError(explain(type(model).__name__, "a decoder or an encoder of text", got, cure))
    _check_positions(model, load.prompt)
    names = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True} if "use_cache" in names else {}
    options |= {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    found = {"prefill": count(model, {"input_ids": _tokens(load.batch, load.prompt), **options})}
    cache = getattr(found["prefill"].output, "past_key_values", None)
    if cache is not None:
        _check_positions(model, load.context + 1)
        if load.context != load.prompt:
            before = count(model, {"input_ids": _tokens(load.batch, load.context), **options})
            cache = before.output.past_key_values
        found["decode"] = count(model, {"input_ids": _tokens(load.batch, 1), "past_key_values": cache, **options})
    return found


def _positions(model: nn.Module) -> int | None:
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def _check_positions(model: nn.Module, length: int) -> None:
    limit = _positions(model)
    if limit and length > limit:
        cure = "Lower --prompt or --context."
        raise ValueError(explain(type(model).__name__, f"at most {limit} tokens", length, cure))


def _tokens(batch: int, length: int) -> torch.Tensor:
    return torch.zeros(batch, length, dtype=torch.long, device="meta")
