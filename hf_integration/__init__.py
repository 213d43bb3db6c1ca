"""Quantization-aware training inside transformers' Trainer, with or without touching the script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_integration.arguments import QuantArguments
    from hf_integration.checkpoint import load_training_checkpoint
    from hf_integration.trainer import QuantTrainer, QuantTrainerMixin

__all__ = ["QuantArguments", "QuantTrainer", "QuantTrainerMixin", "load_training_checkpoint"]

_HOME = {
    "QuantArguments": "arguments",
    "QuantTrainer": "trainer",
    "QuantTrainerMixin": "trainer",
    "load_training_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Everything here needs transformers and is imported on first use."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"hf_integration.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
