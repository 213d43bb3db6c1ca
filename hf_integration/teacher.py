"""The teacher that ``--quant_teacher`` names."""

from __future__ import annotations

import transformers
from torch import nn
from transformers import AutoConfig

from lightning_quant.errors import CheckpointError, explain


def load_teacher(path: str) -> nn.Module:
    """A model that ``save_pretrained`` wrote, in the class and dtype it was saved in.

    Args:
        path: The directory.

    Raises:
        CheckpointError: No model there, or one of a class that transformers does not have.
    """
    cure = "Name a directory that save_pretrained wrote, or pass QuantTrainer(teacher=...)."
    try:
        names = AutoConfig.from_pretrained(path).architectures or ["none"]
        if not hasattr(transformers, names[0]):
            raise CheckpointError(explain(path, "a model class of transformers", names[0], cure))
        model: nn.Module = getattr(transformers, names[0]).from_pretrained(path, dtype="auto")
    except OSError as error:
        raise CheckpointError(explain(path, "a model", str(error), cure)) from error
    return model
