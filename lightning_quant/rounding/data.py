"""Rows of tokens to calibrate with, cut evenly from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import explain


def read_text(path: str | Path | None) -> str:
    """A text file; None: the English of the standard library's help topics."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def rows(text: str, tokenizer: Any, vocabulary: int, samples: int, length: int) -> list[dict[str, Tensor]]:
    """Batches of one row each, at equal distances in the text.

    Args:
        text: Any.
        tokenizer: transformers'; None: bytes are the tokens.
        vocabulary: How many tokens the model knows.
        samples: How many rows.
        length: Tokens in each.

    Raises:
        ValueError: The text is too short, or has tokens that the model does not know.
    """
    if samples < 1 or length < 1:
        raise ValueError(explain("ptq", "samples and length of at least 1", f"{samples}, {length}", "Leave them out."))
    if tokenizer is None:
        found = list(text.encode())
    else:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(found) < samples * length:
        got, cure = f"{len(found)}", "Give a longer text, or fewer or shorter samples."
        raise ValueError(explain("ptq", f"a text of {samples} x {length} tokens", got, cure))
    if max(found) >= vocabulary:
        cure = "Save the model's tokenizer beside its weights."
        raise ValueError(explain("ptq", f"tokens below {vocabulary}, the model's vocabulary", max(found), cure))
    step = (len(found) - length) // max(samples - 1, 1)
    return [{"input_ids": torch.tensor([found[i * step : i * step + length]])} for i in range(samples)]
