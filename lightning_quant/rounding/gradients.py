"""Squared gradients of the loss at outputs of blocks: how much each number of an output matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.bypass import bypassed
from lightning_quant.rounding.unit import Call, first_tensor


def squared_gradients(model: nn.Module, paths: Sequence[str], batches: Sequence[Any]) -> dict[str, list[Tensor]]:
    """By block, one tensor per batch of the output's shape, of mean 1 over all batches.

    Args:
        model: In evaluation mode; its output has a ``loss`` where the batch holds labels.
        paths: The blocks'.
        batches: Each of any of the usual forms.

    Returns:
        Nothing for models without a loss.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    for batch in batches:
        outputs: dict[str, Tensor] = {}

        def keep(path: str, own: dict[str, Tensor] = outputs) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first = first_tensor(output)
                if not first.requires_grad:  # frozen models have gradients too
                    first.requires_grad_(True)
                own.setdefault(path, first)

            return hook

        handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
        try:
            with torch.enable_grad(), bypassed(model):
                loss = getattr(Call.of(batch).run(model), "loss", None)
        finally:
            for handle in handles:
                handle.remove()
        if loss is None:
            return {}
        grads = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
        for (path, y), g in zip(outputs.items(), grads, strict=True):
            found[path].append(torch.zeros_like(y) if g is None else g.float().square())
    for path, squares in found.items():
        mean = sum(float(s.mean()) for s in squares) / max(len(squares), 1)
        found[path] = [s / mean for s in squares] if mean > 0 else []
    return found
