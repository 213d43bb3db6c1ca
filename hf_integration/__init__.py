"""Quantization-aware training inside transformers' Trainer, with or without touching the script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_integration.arguments import QuantArguments
    from hf_integration.trainer import QuantTrainer, QuantTrainerMixin
    from lightning_quant.checkpoint import load_training_checkpoint

__all__ = ["QuantArguments", "QuantTrainer", "QuantTrainerMixin", "load_training_checkpoint"]

_HOME = {
    "QuantArguments": "hf_integration.arguments",
    "QuantTrainer": "hf_integration.trainer",
    "QuantTrainerMixin": "hf_integration.trainer",
    "load_training_checkpoint": "lightning_quant.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Everything here needs transformers and is imported on first use."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
