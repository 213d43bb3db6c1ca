"""Layers of bitsandbytes under our quantizers: QLoRA with a base that stays in NF4, FP4 or int8.

Imported when a model holds one.  The weight is what bitsandbytes itself makes of its codes, in the dtype of the rest of
the model; ``compute_dtype`` and the outlier threshold of its own products are not followed, since no export has them.

Source: Dettmers et al. 2023, arXiv:2305.14314 (4 bits), Dettmers et al. 2022, arXiv:2208.07339 (int8).
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from lightning_quant.errors import AttachError, explain
from lightning_quant.layers import QuantCompactLinear, QuantLayer
from lightning_quant.packed import CompactLinear


@torch.no_grad()
def dense(layer: nn.Linear, where: str = "") -> Tensor:
    """The weight (out, in) of a layer of bitsandbytes, made anew, in the dtype that it had before it was rounded.

    Raises:
        AttachError: There are no codes yet, or float weights that are rounded on the fly.
    """
    held: Any = layer._parameters["weight"]
    if isinstance(held, Params4bit):
        state = held.quant_state
        if state is not None:
            if getattr(state, "packing_format_for_cpu", False):
                layer.state_dict()  # brings back the order of codes that a forward in evaluation mode has changed
                state = held.quant_state
            return functional.dequantize_4bit(held.data, state)  # type: ignore[no-any-return]
    elif (scale := _scale(layer)) is not None and held.dtype == torch.int8:
        return functional.int8_vectorwise_dequant(held.data, scale)  # type: ignore[no-any-return]
    got, cure = f"{type(held).__name__} without codes", "Load it with a BitsAndBytesConfig, or move it to its device."
    raise AttachError(explain(where or type(layer).__name__, "weights that bitsandbytes has rounded", got, cure))


def _scale(layer: Any) -> Tensor | None:
    """Largest magnitudes of an int8 weight's rows, where they are before or after the first forward."""
    held: Any = layer._parameters["weight"]
    scale: Tensor | None = getattr(held, "SCB", None)
    return layer.state.SCB if scale is None else scale


class _Stored:
    """What the classes below have in common; in front of a class of bitsandbytes."""

    kept: tuple[str, ...] = ()  # attributes that go with the stored weight
    _parameters: dict[str, Any]
    _modules: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out, in), made anew, in the quantizer's dtype."""
        values, q = dense(self), self._modules.get("weight_quant")  # type: ignore[arg-type]
        return values if q is None else values.to(q.dtype)

    def _drop_stored(self) -> None:
        del self._parameters["weight"]
        for name in self.kept:
            del self.__dict__[name]


class _Stored4bit(_Stored):
    kept = ("quant_state", "compute_dtype", "compute_type_is_set", "quant_storage", "support_avx512bf16_for_cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # type: ignore[arg-type]
        for name, value in self._parameters["weight"].quant_state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{name}"] = value if keep_vars else value.detach()


class _Stored8bit(_Stored):
    kept = ("state", "index")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)  # type: ignore[arg-type]
        scale: Any = _scale(self)
        destination[f"{prefix}SCB"] = scale if keep_vars else scale.detach()
        destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)  # rows, as bitsandbytes writes it


class QuantLinear4bit(_Stored4bit, QuantCompactLinear, Linear4bit):  # type: ignore[misc, override]
    """``bitsandbytes.nn.Linear4bit`` whose dense weight, with adapters in it, goes on the grid."""


class QuantLinear8bitLt(_Stored8bit, QuantCompactLinear, Linear8bitLt):  # type: ignore[misc, override]
    """``bitsandbytes.nn.Linear8bitLt`` whose dense weight, with adapters in it, goes on the grid."""


class DenseLinear4bit(_Stored4bit, CompactLinear, Linear4bit):  # type: ignore[misc, override]
    """``bitsandbytes.nn.Linear4bit`` without kernels of its own: the product with the dense weight."""


class DenseLinear8bitLt(_Stored8bit, CompactLinear, Linear8bitLt):  # type: ignore[misc, override]
    """``bitsandbytes.nn.Linear8bitLt`` without kernels of its own: the product with the dense weight."""


BNB_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {Linear4bit: QuantLinear4bit, Linear8bitLt: QuantLinear8bitLt}
DENSE: dict[type[nn.Module], type[CompactLinear]] = {Linear4bit: DenseLinear4bit, Linear8bitLt: DenseLinear8bitLt}
