"""Integers of a few bits in words of 32, as compressed-tensors packs them: along rows, the first one lowest."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

ROWS = 2**21  # numbers that are packed at a time, so that temporaries stay small


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """``pack_to_int32(codes, bits)``, bit for bit, in a few passes over bytes where rows fill whole words.

    Args:
        codes: (out, in), int8, from -2^(bits-1).
        bits: Of each, in [1, 8].

    Returns:
        (out, ceil(in * bits / 32)), int32; of codes without values, a tensor without values.

    >>> pack_words(torch.tensor([[-8, -7, 0, 7, -8, -8, -8, -8]], dtype=torch.int8), 4)
    tensor([[63504]], dtype=torch.int32)
    """
    from compressed_tensors.compressors import pack_to_int32

    rows, width = codes.shape
    whole = 8 % bits == 0 and width * bits % 32 == 0 and sys.byteorder == "little"
    packed = torch.empty((rows, -(-width * bits // 32)), dtype=torch.int32, device="meta" if codes.is_meta else "cpu")
    if codes.is_meta:
        return packed
    step = max(ROWS // max(width, 1), 1)
    for start in range(0, rows, step):
        part = codes[start : start + step].cpu()
        packed[start : start + step] = _bytes(part, bits).view(torch.int32) if whole else pack_to_int32(part, bits)
    return packed


def _bytes(codes: Tensor, bits: int) -> Tensor:
    shifted = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))  # wraps around, as bytes do
    per_byte = 8 // bits
    packed = shifted[:, ::per_byte].clone(memory_format=torch.contiguous_format)  # of one row, too
    for place in range(1, per_byte):
        packed |= shifted[:, place::per_byte] << (bits * place)
    return packed
