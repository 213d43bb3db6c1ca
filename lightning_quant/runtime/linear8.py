"""Weights of up to 8 bits, one scale per output channel, beside bfloat16 inputs, on int8 kernels.

The codes are exact in bfloat16, so no way rounds weights.  Few rows go through a kernel that reads every code once:
``native``'s, else PyTorch's.  More go through tiles where the processor has AMX.  Elsewhere many rows multiply with the
codes converted to bfloat16, in pieces that fit into a cache, and the outputs take the scale, rounded twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lightning_quant.runtime import native
from lightning_quant.runtime.base import CHUNK_BYTES, LowBitLinear, has_amx
from lightning_quant.runtime.stored import StoredLinear

# Rows up to which few rows' kernel beats what many rows take; examples/benchmarks/runtime.py measures it.
PACK_ROWS = {"tiles": 6, "dense with AMX": 10, "dense": 24}
ALIGNED = 32  # PyTorch's kernel reads beyond rows that are no multiple of this (torch 2.13 crashes)


def many_rows() -> str:
    """What many rows take on this machine: a key of ``PACK_ROWS``."""
    if native.find("int8_tiles"):
        return "tiles"
    return "dense with AMX" if has_amx() else "dense"


class Int8Linear(LowBitLinear):
    """int8 codes with a scale per channel; computes in bfloat16.

    Args:
        stored: Symmetric, with one scale per row.
        device: Where it runs.
    """

    weight_codes: Tensor
    scale: Tensor
    kernel = "int8"

    def __init__(self, stored: StoredLinear, device: torch.device) -> None:
        out, width = stored.codes.shape
        super().__init__(width, out, stored.bias, torch.bfloat16)
        self.register_buffer("weight_codes", stored.codes.to(device).contiguous())
        self.register_buffer("scale", stored.scale.to(device=device, dtype=torch.bfloat16).flatten())
        self.packs = device.type == "cpu" and width % ALIGNED == 0

    def product(self, x: Tensor) -> Tensor:
        """As ``LowBitLinear.product``."""
        way = many_rows() if self.packs else "dense"
        if self.packs and len(x) <= PACK_ROWS[way]:
            few = native.find("int8_rows") or torch.ops.aten._weight_int8pack_mm
            y: Tensor = few(x, self.weight_codes, self.scale)
            return y
        tiles = native.find("int8_tiles") if way == "tiles" else None
        return tiles(x, self.weight_codes, self.scale) if tiles else self._by_dense(x)

    def _by_dense(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.out_features)
        step = max(1, CHUNK_BYTES // (2 * self.in_features))
        for i in range(0, self.out_features, step):
            y[:, i : i + step] = F.linear(x, self.weight_codes[i : i + step].to(x.dtype))
        return y.mul_(self.scale)

    def codes(self) -> Tensor:
        """As ``LowBitLinear.codes``."""
        return self.weight_codes

    @property
    def weight(self) -> Tensor:
        """As ``LowBitLinear.weight``."""
        return StoredLinear(self.weight_codes, self.scale.unsqueeze(1), 8).dense(torch.bfloat16)
