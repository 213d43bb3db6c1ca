"""What a training step hands to the model: seen without running the model, its loss or an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_quant.errors import AttachError, explain
from lightning_quant.transforms.pairs import Inputs, is_consumer

CURE = "Run the transforms by hand before training: lightning_quant.transforms.smoothquant(model, batches)."


class _Seen(BaseException):
    """Ends a training step; no user's ``except Exception`` stops it."""


def first_call(model: nn.Module, step: Callable[[], Any], where: str) -> Inputs:
    """The arguments that a training step calls the model with, or the submodule that holds all its layers.

    Args:
        model: Its calls are watched; it is not run.
        step: Runs a training step, which ends at that call.
        where: What ``step`` is, for the message.

    Raises:
        AttachError: The step calls neither, or fails before it does.
    """
    layers = {id(m) for m in model.modules() if is_consumer(m)}
    holders = {
        path: m for path, m in model.named_modules() if layers <= {id(c) for c in m.modules()} and not is_consumer(m)
    }
    found: list[Inputs] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            copied, named = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
            found.append(Inputs(copied, named, path))
            raise _Seen

        return hook

    handles = [m.register_forward_pre_hook(keep(path), with_kwargs=True) for path, m in holders.items()]
    try:
        step()
    except _Seen:
        return found[0]
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise AttachError(explain(where, "a step that reaches the model before training starts", got, CURE)) from error
    finally:
        for handle in handles:
            handle.remove()
    got = f"none of {', '.join(repr(p) if p else type(model).__name__ for p in holders)} called"
    raise AttachError(explain(where, "one module that holds all layers to be called", got, CURE))
