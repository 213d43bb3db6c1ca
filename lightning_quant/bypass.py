"""The float model inside a quantized one: run it for a moment, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_quant.quantizer import FakeQuantizer


@contextmanager
def bypassed(model: nn.Module, adapters: bool = False) -> Iterator[None]:
    """While open, every quantizer of the model returns what it is given.

    Layers then compute with their float weights: normalizations stay folded in, LoRA stays merged.  Quantizers do not
    count as called, and observers see nothing.

    Args:
        model: Any model.
        adapters: Leave out what PEFT put beside the layers as well, so that what is left is the model it was given.
    """
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantizer) and m.enabled]
    beside = [m for m in model.modules() if adapters and getattr(m, "_disable_adapters", None) is False]
    try:
        for q in quantizers:
            q.enabled = False
        for module in beside:  # PEFT's own switch also stops their training, until the optimizer has lost them
            module._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for q in quantizers:
            q.enabled = True
        for module in beside:
            module._disable_adapters = False  # type: ignore[assignment]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, every module is in evaluation mode, whatever its ``train()`` would say; then each is as it was."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """While open, autocast keeps no casts of weights: memory that lasts to the end of the training step's forward.

    Older releases of torch also take casts made without gradients for those to train (pytorch#158232).
    """
    cached = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
