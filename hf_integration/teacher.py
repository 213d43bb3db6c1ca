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
        name = (AutoConfig.from_pretrained(path).architectures or ["none"])[0]
        if not hasattr(transformers, name):
            raise CheckpointError(explain(path, "a model class of transformers", name, cure))
        model: nn.Module = getattr(transformers, name).from_pretrained(path, dtype="auto")
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # no config file, or one of something else
        raise CheckpointError(explain(path, "a model", str(error), cure)) from error
    return model
