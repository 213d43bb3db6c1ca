"""Keys and values on a low-bit grid before they enter the cache, in training as in serving.

Attention of transformers hands its keys (after the rotary embedding) and values to ``past_key_values.update``.  A hook
puts an object in the cache's place that rounds them first, whether there is a cache or not, and passes the rest on.
One static range per module for keys and one for values, observed in the calibration steps; gradients pass straight
through.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_quant.errors import AttachError, explain
from lightning_quant.quantizer import FakeQuantizer

NAME = "kv_quant"
ARGUMENT = "past_key_values"


class KvQuant(nn.Module):
    """The quantizers of one attention module: ``k`` and ``v``."""

    def __init__(self, k: FakeQuantizer, v: FakeQuantizer) -> None:
        super().__init__()
        self.k, self.v = k, v


class _Rounding:
    """Stands in for a cache during one call."""

    def __init__(self, quant: KvQuant, cache: Any) -> None:
        self._quant, self._cache = quant, cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Round, then do what the cache does."""
        keys, values = self._quant.k(key_states), self._quant.v(value_states)
        if self._cache is None:
            return keys, values
        stored: tuple[Tensor, Tensor] = self._cache.update(keys, values, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _round_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    quant: Any = getattr(module, NAME)
    return args, {**kwargs, ARGUMENT: _Rounding(quant, kwargs.get(ARGUMENT))}


def plan_kv_cache(model: nn.Module) -> list[str]:
    """Paths of the attention modules whose keys and values go to a cache.

    Raises:
        AttachError: There is none.
    """
    config = getattr(model, "config", None)
    found = [path for path, m in model.named_modules() if _caches(m)]
    if not found or getattr(config, "is_encoder_decoder", False):
        got = "an encoder-decoder" if found else "none"
        cure = "Leave kv_cache out."
        raise AttachError(explain("kv_cache", "attention of a decoder of transformers", got, cure))
    return found


def attach_kv_cache(model: nn.Module, paths: list[str], build: Callable[[str], FakeQuantizer]) -> None:
    """Give attention modules their quantizers, in place.

    Args:
        model: The model.
        paths: From ``plan_kv_cache``.
        build: Makes a quantizer, given its path.
    """
    for path in paths:
        module = model.get_submodule(path)
        quant = KvQuant(build(f"{path}.{NAME}.k"), build(f"{path}.{NAME}.v"))
        module.add_module(NAME, quant.train(module.training))
        module.register_forward_pre_hook(_round_first, with_kwargs=True)


def detach_kv_cache(model: nn.Module) -> None:
    """Undo ``attach_kv_cache``."""
    for module in [m for m in model.modules() if isinstance(m._modules.get(NAME), KvQuant)]:
        delattr(module, NAME)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _round_first:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def kv_quantizers(model: nn.Module) -> dict[str, KvQuant]:
    """Quantizers of keys and values, by the path of their attention module."""
    return {p.removesuffix(f".{NAME}"): m for p, m in model.named_modules() if isinstance(m, KvQuant)}


def _caches(module: nn.Module) -> bool:
    named = "attention" in type(module).__name__.lower() and hasattr(module, "layer_idx")
    if not named or not getattr(module, "is_causal", True):  # an encoder's take a cache too, and never get one
        return False
    return ARGUMENT in inspect.signature(module.forward).parameters
