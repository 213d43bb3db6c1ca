"""Rotations: an orthogonal change of basis of the residual stream spreads outliers over all channels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.transforms.pairs import as_batches, find_pairs
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import TOLERANCE, TransformReport
from lightning_quant.transforms.rotation import fuse


def random_hadamard(size: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix (size, size) in float64: Hadamard's with random signs, so that entries are +-1/sqrt(size).

    Where the size is no power of two, its odd factor gets a random orthogonal block.

    >>> h = random_hadamard(4)
    >>> torch.allclose(h @ h.T, torch.eye(4, dtype=torch.float64)), h.abs().unique().tolist()
    (True, [0.5])
    """
    draw = torch.Generator().manual_seed(seed)
    odd = size
    while odd % 2 == 0:
        odd //= 2
    q, r = torch.linalg.qr(torch.randn(odd, odd, dtype=torch.float64, generator=draw))
    h = q * r.diagonal().sign()
    for _ in range(int(math.log2(size // odd))):
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    signs = torch.randint(0, 2, (size,), generator=draw).double() * 2 - 1
    turned: Tensor = h * signs.unsqueeze(1) / math.sqrt(size // odd)
    return turned


def first_rotation(name: str, size: int, seed: int) -> Tensor:
    """The random rotation of that name (see ``rotation.Choose``)."""
    return random_hadamard(size, seed + 1 if name else seed)


@computed_in_float32
@torch.no_grad()
def rotate(
    model: nn.Module, batches: Iterable[Any], seed: int = 0, heads: bool = True, tolerance: float = TOLERANCE
) -> TransformReport:
    """Rotate the residual stream, and each head's values, with random Hadamard matrices fused into weights, in place.

    What writes to the stream (embeddings, attention's output, the feed-forward output) is multiplied with R, what
    reads it with R^T; scales of normalizations move into their readers first, since RMS normalization commutes with
    R only without them.  Values and attention's output are rotated within heads alike.  Nothing is computed online.

    Args:
        model: In float, before ``attach``; decoders with RMS normalization right before every reader, as Llama's.
        batches: Data, to find the stream and to prove that the output stays.
        seed: Of the signs.
        heads: Rotate values within heads as well.
        tolerance: How far the output may move, relative to its largest value, for the stream to stay rotated; what
            float32 rounds adds up over all layers.

    Raises:
        ValueError: No batch.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv:2404.00456.
    Deviation: the rotations in front of the down projection, and of queries and keys, are left out: they would have to
    be computed in every forward, which no exported format describes.
    """
    data = as_batches(batches)
    pairs = find_pairs(model, data[0]).found
    report, _ = fuse(
        model, pairs, data, lambda name, size: first_rotation(name, size, seed), heads, tolerance, "rotate"
    )
    return report


__all__ = ["first_rotation", "random_hadamard", "rotate"]
