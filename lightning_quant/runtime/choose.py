"""Which kernel a stored layer runs on, why, and the layer itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_quant.runtime.linear4 import Int4Linear, kernel_group
from lightning_quant.runtime.linear8 import Int8Linear
from lightning_quant.runtime.stored import InputRule, StoredLinear
from lightning_quant.runtime.w8a8 import CUDA_ALIGNED, W8A8Linear

CUDA_WIDTH = 128  # the int4 kernel's tiles on CUDA: 8 of 16 columns


class Kind(NamedTuple):
    """What choosing needs to know of a layer.

    Attributes:
        shape: (out, in).
        bits: Width of a code.
        groups: Scales per row.
        symmetric: No zero points.
        rounds_inputs: To 8 bits.
    """

    shape: tuple[int, int]
    bits: int
    groups: int
    symmetric: bool
    rounds_inputs: bool


class RoundedLinear(nn.Linear):
    """A dense layer that rounds its inputs, where no kernel computes with the integers."""

    rule: InputRule

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``, of rounded inputs."""
        codes, scale = self.rule.codes(input.reshape(-1, self.in_features))
        return super().forward((codes * scale).to(input.dtype).reshape(input.shape))


def choose(kind: Kind, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Name of the kernel for a layer and, in words, why (empty where its own kernel runs it).

    Args:
        kind: The layer.
        dtype: What the model computes in.
        device: Where.
    """
    out, width = kind.shape
    cuda = device.type == "cuda"
    if not kind.symmetric:
        return "dense", "zero points"
    if kind.rounds_inputs:
        if kind.groups > 1:
            return "dense", "no kernel multiplies int8 inputs with weights in groups; inputs are rounded all the same"
        if cuda and (out % CUDA_ALIGNED or width % CUDA_ALIGNED):
            return "dense", f"the CUDA kernel wants sizes that {CUDA_ALIGNED} divides"
        return "w8a8", "" if kind.bits == 8 else f"{kind.bits}-bit codes stored in 8 bits"
    if dtype != torch.bfloat16:
        return "dense", f"the kernels compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if kind.bits <= 4 and not (cuda and width % CUDA_WIDTH) and kernel_group(width, kind.groups):
        return "int4", "" if kind.bits == 4 else f"{kind.bits}-bit codes stored in 4 bits"
    if kind.groups > 1:
        return "dense", f"no kernel has {kind.bits} bits in groups of {width // kind.groups}"
    return "int8", "" if kind.bits == 8 else f"{kind.bits}-bit codes stored in 8 bits"


def build(kernel: str, stored: StoredLinear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The layer that computes with what is stored.

    Args:
        kernel: As ``choose`` named it.
        stored: The layer's integers and scales, on any device.
        dtype: What the model computes in.
        device: Where.
    """
    if kernel == "int4":
        return Int4Linear(stored, device).to(device)
    if kernel == "int8":
        return Int8Linear(stored, device).to(device)
    if kernel == "w8a8":
        return W8A8Linear(stored, device, dtype).to(device)
    out, width = stored.codes.shape
    return dense_layer(stored.dense(dtype), stored.bias, stored.inputs, (out, width), device)


def dense_layer(
    weight: Tensor, bias: Tensor | None, inputs: InputRule | None, shape: tuple[int, int], device: torch.device
) -> nn.Linear:
    """A frozen dense layer with this weight, whose inputs are rounded if there is a rule for them."""
    with torch.device("meta"):
        layer = nn.Linear(shape[1], shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device=device, dtype=weight.dtype), requires_grad=False)
    if inputs is not None:
        layer.__class__ = RoundedLinear
        fixed = inputs.scale
        layer.rule = InputRule(None if fixed is None else fixed.to(device), inputs.divisor)  # type: ignore[assignment]
    return layer
