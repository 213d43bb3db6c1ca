"""GGUF's blocks of 32 weights: bytes from integers and half-precision scales, and back.  Pure functions on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """One layout.

    Attributes:
        bits: Stored width of an integer.
        zero: What is added to a code before it is stored without a sign; None where codes keep theirs (int8).
        minimum: Whether a block holds its smallest level beside its step: ``w = d * u + m``, else ``w = d * code``.
        size: Bytes of a block.
    """

    bits: int
    zero: int | None
    minimum: bool
    size: int


BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(4, 8, False, 18),
    "Q5_0": BlockType(5, 16, False, 22),
    "Q8_0": BlockType(8, None, False, 34),
    "Q4_1": BlockType(4, 0, True, 20),
    "Q5_1": BlockType(5, 0, True, 24),
}


@dataclass(frozen=True)
class Blocks:
    """The numbers of a matrix, or of a stack of them.

    Attributes:
        codes: Integers, (..., rows, columns); with a minimum they count from the lowest level, from 0 on.
        scale: Steps, float16, (..., rows, columns / 32).
        minimum: Lowest levels, float16, in the same shape; None where 0 is a level by itself.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None


def smallest_type(low: int, high: int, minimum: bool) -> str | None:
    """Name of the smallest layout that holds codes from ``low`` to ``high``; None if there is none.

    >>> smallest_type(-8, 7, False), smallest_type(-1, 1, False), smallest_type(-16, 15, True)
    ('Q4_0', 'Q4_0', 'Q5_1')
    >>> smallest_type(-128, 127, True) is None
    True
    """
    for name, kind in BLOCK_TYPES.items():
        if kind.minimum == minimum:
            half = 2 ** (kind.bits - 1)
            if (high - low < 2 * half) if minimum else (-half <= low and high < half):
                return name
    return None


def pack(name: str, blocks: Blocks) -> Tensor:
    """Bytes of a matrix, uint8 (..., rows, columns / 32 * size).

    A block holds its step, then its minimum if it has one (both little-endian float16), then of five bits the fifth
    ones (bit i of a little-endian 32-bit word belongs to element i), then 16 bytes whose low halves are elements 0 to
    15 and whose high halves are 16 to 31; Q8_0 holds 32 signed bytes instead.

    Source: ``ggml-common.h`` of llama.cpp.

    Args:
        name: Of the layout.
        blocks: What to pack; the last dimension of the codes is a multiple of 32.
    """
    kind = BLOCK_TYPES[name]
    codes = _cut(blocks.codes.to(torch.int16), BLOCK)
    parts = [_bytes(blocks.scale)]
    if blocks.minimum is not None:
        parts.append(_bytes(blocks.minimum))
    if kind.zero is None:
        parts.append(codes.to(torch.int8).view(torch.uint8))
    else:
        codes = codes + kind.zero
        if kind.bits == 5:
            fifth = _cut(codes >> 4, 8)
            parts.append((fifth << torch.arange(8, dtype=torch.int16)).sum(-1).to(torch.uint8))
        low, high = _cut(codes & 15, BLOCK // 2).unbind(-2)
        parts.append((low | high << 4).to(torch.uint8))
    return torch.cat(parts, dim=-1).flatten(-2)


def unpack(name: str, data: Tensor) -> Blocks:
    """The inverse of ``pack``: codes come as int8.

    Args:
        name: Of the layout.
        data: uint8, (..., rows, bytes).
    """
    kind = BLOCK_TYPES[name]
    data = _cut(data, kind.size)
    scale, data = _halves(data[..., :2]), data[..., 2:]
    minimum = None
    if kind.minimum:
        minimum, data = _halves(data[..., :2]), data[..., 2:]
    if kind.zero is None:
        return Blocks(data.contiguous().view(torch.int8).flatten(-2), scale, minimum)
    fifth = 0 * data[..., :1]
    if kind.bits == 5:
        fifth = (data[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4
        data = data[..., 4:]
    codes = (torch.cat([data & 15, data >> 4], dim=-1) | fifth).to(torch.int8) - kind.zero
    return Blocks(codes.flatten(-2), scale, minimum)


def real(blocks: Blocks) -> Tensor:
    """The weights that blocks stand for, float32."""
    levels = _cut(blocks.codes.float(), BLOCK) * blocks.scale.float().unsqueeze(-1)
    if blocks.minimum is not None:
        levels = levels + blocks.minimum.float().unsqueeze(-1)
    return levels.flatten(-2)


def is_half(x: Tensor) -> bool:
    """Whether every number is one of float16."""
    return bool((x.to(torch.float16).to(x.dtype) == x).all())


def per_block(scale: Tensor, columns: int) -> Tensor:
    """Scales (..., groups) of rows that long, repeated for each block: float16, (..., columns / 32)."""
    return scale.repeat_interleave(columns // BLOCK // scale.shape[-1], dim=-1).to(torch.float16)


def _cut(x: Tensor, size: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, size)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().unsqueeze(-1).view(torch.uint8)


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).squeeze(-1)
