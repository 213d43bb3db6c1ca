"""Weights of up to 4 bits beside bfloat16 inputs, on PyTorch's int4 kernel.

Few rows (decoding) go through the kernel, which reads half a byte per weight.  It unpacks the weights again for every
few rows, so more rows (prompts, batches) go through a kernel of our own where the processor has AMX (``native``).
Elsewhere many rows multiply with a dense bfloat16 copy, made in pieces that fit into a cache: the memory for it is
``CHUNK_BYTES`` whatever the layer's size.

Numerics: the kernel multiplies (code * scale) in float32 and rounds the output once; with more rows the weight has the
value bf16(code * scale), as a reader that dequantizes has it.  Scales are rounded to bfloat16, which changes nothing
where the file holds bfloat16, and up to 2^-8 of a weight where it holds float32 or float16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lightning_quant.runtime import native
from lightning_quant.runtime.base import CHUNK_BYTES, LowBitLinear, has_amx
from lightning_quant.runtime.stored import StoredLinear

GROUPS = (256, 128, 64, 32)  # group sizes that the kernel has, the fastest first
# Rows up to which the kernel beats what many rows take; examples/benchmarks/runtime.py measures it.
PACK_ROWS = {"tiles": 6, "dense with AMX": 26, "dense": 80}
BLOCK = 64  # rows of weight that the CPU kernel interleaves; others are padded to a multiple
CUDA_TILES = 8


def kernel_group(in_features: int, groups: int) -> int | None:
    """The kernel's group size for rows in this many groups (each may be cut into several), or None."""
    return next((g for g in GROUPS if in_features // groups % g == 0), None)


@cache
def half_block() -> int | None:
    """Half the rows that this machine's kernel interleaves in a byte's two halves; None: another order.

    ATen picks the order by the processor's vectors, so it is found by packing a known matrix.
    """
    codes = torch.arange(2 * BLOCK * 32, dtype=torch.int32).reshape(2 * BLOCK, 32).mul_(7).bitwise_right_shift_(2) & 15
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for half in (32, 16):
        if torch.equal(_codes(packed, half), codes.to(torch.int8) - 8):
            return half
    return None


def _codes(packed: Tensor, half: int) -> Tensor:
    """Signed codes, (out, in), of a weight that the CPU kernel reads."""
    out, width = packed.shape[0], packed.shape[1] * 2
    pair = packed.view(out // (2 * half), width, half)
    return torch.stack((pair & 15, pair >> 4), 1).transpose(2, 3).reshape(out, width).to(torch.int8) - 8


def dense_block(packed: Tensor, scale: Tensor) -> Tensor:
    """A piece of the dense weight, transposed, out of what the CPU kernel reads.

    Args:
        packed: (blocks, in, half), uint8.
        scale: (groups, blocks, 2, half), bfloat16.

    Returns:
        (in, blocks * 2 * half), bfloat16.
    """
    groups = scale.shape[0]
    blocks, width, half = packed.shape
    pair = packed.transpose(0, 1).reshape(groups, width // groups, blocks, half)
    real = scale.float().unsqueeze(1)
    low = ((pair & 15).float() - 8) * real[:, :, :, 0]
    high = ((pair >> 4).float() - 8) * real[:, :, :, 1]
    return torch.stack((low.bfloat16(), high.bfloat16()), -2).flatten(2).flatten(0, 1)


@cache
def fast_dense_block() -> Callable[[Tensor, Tensor], Tensor]:
    """``dense_block`` in one compiled pass, or as it is where no compiler works."""
    packed, scale = torch.zeros(5, 256, 32, dtype=torch.uint8), torch.zeros(4, 5, 2, 32, dtype=torch.bfloat16)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's imports warn of what they deprecate themselves
            compiled = torch.compile(dense_block, dynamic=True)
            compiled(packed[:3], scale[:, :3])  # pieces, as later calls hand in
    except Exception:  # whatever a missing or broken compiler raises; the result is the same, only later
        return dense_block
    return compiled


@cache
def many_rows() -> str:
    """What many rows take on this machine: a key of ``PACK_ROWS``, or ``""`` where only the kernel knows its format."""
    if half_block() == 32 and native.find("int4_tiles"):
        return "tiles"
    if half_block() is None:
        return ""
    return "dense with AMX" if has_amx() else "dense"


class Int4Linear(LowBitLinear):
    """Codes of at most 4 bits in groups; computes in bfloat16.

    Args:
        stored: Symmetric, in groups that ``kernel_group`` accepts.
        device: Where it runs.
    """

    packed: Tensor
    scale_zero: Tensor
    kernel = "int4"

    def __init__(self, stored: StoredLinear, device: torch.device) -> None:
        out, width = stored.codes.shape
        super().__init__(width, out, stored.bias, torch.bfloat16)
        group = kernel_group(width, stored.scale.shape[1])
        assert group is not None, "the caller asks kernel_group first"
        self.group = group
        codes = stored.codes.to(device=device, dtype=torch.int32) + 8
        scale = stored.scale.to(device=device, dtype=torch.bfloat16)
        scale = scale.repeat_interleave(width // group // scale.shape[1], dim=1)
        missing = -out % BLOCK
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing), value=8)
        scale = torch.nn.functional.pad(scale, (0, 0, 0, missing))
        if device.type == "cuda":
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, CUDA_TILES)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
        self.register_buffer("packed", packed)
        self.register_buffer("scale_zero", torch.stack((scale.t(), torch.zeros_like(scale.t())), -1).contiguous())

    def product(self, x: Tensor) -> Tensor:
        """As ``LowBitLinear.product``."""
        way = many_rows() if x.device.type == "cpu" else ""
        if not way or len(x) <= PACK_ROWS[way]:
            return self._by_kernel(x, self.scale_zero)
        return self._by_tiles(x) if way == "tiles" else self._by_dense(x)

    def _by_tiles(self, x: Tensor) -> Tensor:
        tiles = native.find("int4_tiles")
        assert tiles is not None, "many_rows asked"
        return tiles(x, self.packed, self.scale_zero)[:, : self.out_features]

    def _by_kernel(self, x: Tensor, scale_zero: Tensor) -> Tensor:
        if x.device.type == "cuda":
            y: Tensor = torch.ops.aten._weight_int4pack_mm(x, self.packed, self.group, scale_zero)
        else:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, self.group, scale_zero)
        return y[:, : self.out_features]

    def _by_dense(self, x: Tensor) -> Tensor:
        half = half_block()
        assert half is not None
        rows = self.packed.shape[0]
        packed = self.packed.view(rows // (2 * half), self.in_features, half)
        scale = self.scale_zero[:, :, 0].contiguous().view(len(self.scale_zero), -1, 2, half)  # vectors want no gaps
        step = max(1, CHUNK_BYTES // (self.in_features * 4 * half))
        y = x.new_empty(len(x), rows)
        for i in range(0, len(packed), step):
            block = fast_dense_block()(packed[i : i + step], scale[:, i : i + step])
            torch.matmul(x, block, out=y[:, i * 2 * half : i * 2 * half + block.shape[1]])
        return y[:, : self.out_features]

    @torch.no_grad()
    def codes(self) -> Tensor:
        """As ``LowBitLinear.codes``: the kernel's own product with the unit matrix, so in whatever order it reads."""
        unit = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.packed.device)
        ones = torch.zeros_like(self.scale_zero)
        ones[..., 0] = 1
        return self._by_kernel(unit, ones).t().to(torch.int8)

    @property
    def weight(self) -> Tensor:
        """As ``LowBitLinear.weight``."""
        scale = self.scale_zero[:, : self.out_features, 0].t()
        return StoredLinear(self.codes(), scale, 4).dense(torch.bfloat16)
