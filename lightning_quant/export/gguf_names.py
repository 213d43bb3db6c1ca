"""Which models llama.cpp computes, and where it expects what of their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from lightning_quant.errors import explain


@dataclass(frozen=True)
class Architecture:
    """What one class of transformers is in llama.cpp.

    Attributes:
        name: Its architecture there.
        interleaved: Rotary dimensions of queries and keys lie in pairs, so that rows are permuted.
        shift: What is added to the weights of normalizations, which there are applied as they are.
        activations: The activation it computes, by the names transformers has for it.
        window: Layers from one with full attention to the next, where it computes sliding windows; 0 where not.
        tied: The head is always the embedding.
        bias: Attention may have biases.
        large: Number of layers by which it tells the one size whose attention is scaled by ``hidden / heads``.
    """

    name: str
    interleaved: bool = False
    shift: float = 0.0
    activations: tuple[str, ...] = ("silu", "swish")
    window: int = 0
    tied: bool = False
    bias: bool = False
    large: int | None = None


_LLAMA = Architecture("llama", interleaved=True, bias=True)
_TANH = ("gelu_pytorch_tanh",)
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", bias=True),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "GemmaForCausalLM": Architecture("gemma", shift=1.0, activations=_TANH, tied=True),
    "Gemma2ForCausalLM": Architecture("gemma2", shift=1.0, activations=_TANH, window=2, tied=True, large=46),
    "Gemma3ForCausalLM": Architecture("gemma3", shift=1.0, activations=_TANH, window=6, large=62),
    "Phi3ForCausalLM": Architecture("phi3"),
}


@dataclass(frozen=True)
class Part:
    """What the file holds of one tensor of the model.

    Attributes:
        name: In the file.
        heads: Rows are permuted within this many heads; 0: they are not.
        half: Which half of the rows it is, of fused gate and up projections; None: all of them.
        shift: What is added.
    """

    name: str
    heads: int = 0
    half: int | None = None
    shift: float = 0.0

    def rows(self, x: Tensor) -> Tensor:
        """Its rows, in the file's order; ``x`` is a vector of rows, a matrix or a stack of matrices."""
        axis = -2 if x.ndim > 1 else -1
        if self.half is not None:
            x = x.chunk(2, dim=axis)[self.half]
        if self.heads:
            x = _exchanged(x, axis, self.heads, 2)
        return x

    def back(self, x: Tensor) -> Tensor:
        """Rows in the model's order, from those of the file."""
        axis = -2 if x.ndim > 1 else -1
        if self.heads:
            x = _exchanged(x, axis, self.heads, x.shape[axis] // self.heads // 2)
        return x - self.shift if self.shift else x


def _exchanged(x: Tensor, axis: int, heads: int, outer: int) -> Tensor:
    """``x`` with each head's rows, seen as ``outer`` runs of equal length, in the order of their places in a run."""
    before, rows, after = x.shape[:axis], x.shape[axis], x.shape[axis:][1:]
    runs = x.reshape(*before, heads, outer, rows // heads // outer, *after)
    return runs.transpose(len(before) + 1, len(before) + 2).reshape(x.shape)


def architecture(model: nn.Module) -> Architecture:
    """The model's.

    Raises:
        ValueError: llama.cpp or this file has none for it.
    """
    kind = type(model).__name__
    if kind not in ARCHITECTURES or not hasattr(model, "config"):
        expected = f"one of {', '.join(ARCHITECTURES)}"
        raise ValueError(explain("format='gguf'", expected, kind, "Use format='folded'."))
    return ARCHITECTURES[kind]


def parts(model: nn.Module, name: str) -> list[Part]:
    """What the file holds of a tensor.

    Args:
        model: The model.
        name: The tensor's name in it.

    Raises:
        ValueError: llama.cpp has no place for it.
    """
    own, config = architecture(model), _config(model)
    if name.endswith(".experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return [Part(_mapped(model, f"{stem}{word}_proj.weight"), half=i) for i, word in enumerate(("gate", "up"))]
    if name.endswith(".experts.down_proj"):
        return [Part(_mapped(model, f"{name}.weight"))]
    heads = 0
    module = name.rpartition(".")[0]
    if own.interleaved and module.endswith("q_proj"):
        heads = config.num_attention_heads
    elif own.interleaved and module.endswith("k_proj"):
        heads = config.num_key_value_heads
    return [Part(_mapped(model, name), heads, shift=own.shift if name.endswith("norm.weight") else 0.0)]


def _mapped(model: nn.Module, name: str) -> str:
    found: str | None = _names(architecture(model).name, _config(model).num_hidden_layers).get_name(
        name, try_suffixes=(".weight", ".bias")
    )
    if found is None:
        expected, cure = f"a tensor that llama.cpp's {architecture(model).name!r} has", "Use format='folded'."
        raise ValueError(explain("format='gguf'", expected, name, cure))
    return found


@cache
def _names(arch: str, layers: int) -> Any:
    import gguf

    key = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(key, layers)


def _config(model: nn.Module) -> Any:
    return model.config
