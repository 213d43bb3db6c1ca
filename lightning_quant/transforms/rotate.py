"""Rotations: an orthogonal change of basis of the residual stream spreads outliers over all channels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import AttachError, explain
from lightning_quant.transforms.pairs import Call, Pair, as_batches, find_pairs, is_consumer, whole
from lightning_quant.transforms.rescale import (
    Applied,
    TransformReport,
    difference,
    rescale,
    shared_weight,
    tolerance,
)

Kept = list[tuple[Tensor, Tensor]]
LIMIT = 10.0  # times what rounding alone may move: here it adds up over all layers
NEAR_ZERO = 1e-6


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


@torch.no_grad()
def rotate(model: nn.Module, batches: Iterable[Any], seed: int = 0, heads: bool = True) -> TransformReport:
    """Rotate the residual stream, and each head's values, with random Hadamard matrices fused into weights, in place.

    What writes to the stream (embeddings, attention's output, the feed-forward output) is multiplied with R, what
    reads it with R^T; scales of normalizations move into their readers first, since RMS normalization commutes with
    R only without them.  Values and attention's output are rotated within heads alike.  Nothing is computed online.

    Args:
        model: In float, before ``attach``; decoders with RMS normalization right before every reader, as Llama's.
        batches: Data, of which the first is used to find the stream and to prove that the output stays.
        seed: Of the signs.
        heads: Rotate values within heads as well.

    Raises:
        ValueError: No batch.

    Source: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv:2404.00456.
    Deviation: the rotations in front of the down projection, and of queries and keys, are left out: they would have to
    be computed in every forward, which no exported format describes.
    """
    batch = as_batches(batches)[0]
    pairs = find_pairs(model, batch)
    report = TransformReport()
    kept = _copies(model)
    try:
        _stream(model, whole(model, batch)[1], pairs.found, seed, report)
    except AttachError as error:
        for tensor, value in kept:
            tensor.copy_(value)
        report = TransformReport(refused={type(model).__name__: str(error)})
    if heads:
        for pair in pairs.found:
            _values(model, pair, seed + 1, report)
    return report


def _stream(model: nn.Module, part: Call, pairs: list[Pair], seed: int, report: TransformReport) -> None:
    """Rotate the residual stream; raises where the model has no such stream, or the output moves."""
    norms = {p.producer: p for p in pairs if getattr(model.get_submodule(p.producer).weight, "ndim", 0) == 1}
    widths = {p.channels for p in norms.values()}
    if len(widths) != 1:
        raise _refused("normalizations of one width before all layers", f"widths {sorted(widths)}")
    width, start = widths.pop(), part()
    readers = {path for pair in norms.values() for path in pair.consumers}
    writers = {p: m for p, m in model.named_modules() if p not in readers and _writes(m, width)}
    for pair in norms.values():
        folded = TransformReport()
        norm: Any = model.get_submodule(pair.producer)
        if norm._parameters.get("bias") is not None or not _is_rms(norm, width):
            raise _refused("RMS normalization without a bias", f"{type(norm).__name__} at {pair.producer}")
        scale = _scale(norm, width)
        if bool((scale.abs() < NEAR_ZERO).any()):
            raise _refused("normalization scales away from 0", f"{float(scale.abs().min()):.1e} at {pair.producer}")
        if not torch.equal(scale, torch.ones_like(scale)) and not rescale(model, pair, scale, "rotate", folded):
            raise _refused("normalizations whose scale can move on", folded.refused[pair.producer])
    r = random_hadamard(width, seed)
    done: set[int] = set()
    for path in [*readers, *writers]:
        module: Any = model.get_submodule(path)
        if id(module.weight) not in done:
            done.add(id(module.weight))
            _turn(module, r, reads=path in readers or isinstance(module, nn.Embedding))
        if path in writers and module._parameters.get("bias") is not None:
            module.bias.copy_(module.bias.double() @ r.to(module.bias.device))
    moved = difference(start, part())
    if moved > LIMIT * tolerance(start[0].dtype):
        raise _refused("an output that stays", f"a change of {moved:.1e}: something else reads or scales the stream")
    turned = tuple(sorted({*readers, *writers}))
    report.applied.append(Applied(f"residual stream of {width}", turned, "rotate", moved))


def _values(model: nn.Module, pair: Pair, seed: int, report: TransformReport) -> None:
    """Rotate values within heads, if this pair is one of values and attention's output: trying tells."""
    first: Any = model.get_submodule(pair.producer)
    if not isinstance(first, nn.Linear) or len(pair.consumers) != 1:
        return
    ((path, index),) = pair.consumers.items()
    second: Any = model.get_submodule(path)
    size = _head_size(model, pair, index)
    if not isinstance(second, nn.Linear) or size is None or shared_weight(model, [first, second]):
        return
    kept = [(p, p.detach().clone()) for m in (first, second) for p in m.parameters()]
    start, h = pair.part(), random_hadamard(size, seed)
    _turn_blocks(first, h, rows=True)
    _turn_blocks(second, h, rows=False)
    moved = difference(start, pair.part())
    if moved <= tolerance(first.weight.dtype):
        report.applied.append(Applied(pair.producer, (path,), "rotate", moved))
        return
    for tensor, value in kept:
        tensor.copy_(value)


def _head_size(model: nn.Module, pair: Pair, index: Tensor) -> int | None:
    """Width of a head: as the module above the producer, or the model's config, says."""
    above: Any = model.get_submodule(pair.producer.rpartition(".")[0])
    for holder in (above, getattr(model, "config", None)):
        size = getattr(holder, "head_dim", None)
        if isinstance(size, int) and pair.channels % size == 0 and len(index) % size == 0:
            return size
    return None


def _writes(module: nn.Module, width: int) -> bool:
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Embedding):
        return bool(weight.shape[1] == width)
    return isinstance(module, nn.Linear) and is_consumer(module) and bool(weight.shape[0] == width)


def _is_rms(norm: nn.Module, width: int) -> bool:
    """Whether it divides by the root mean square and takes no mean off: a shift of all channels shows in its output."""
    weight: Any = norm.weight
    x = torch.full((1, width), 3.0).to(weight)
    return bool(norm(x).abs().sum() > 0.5 * _scale(norm, width).abs().sum())


def _scale(norm: nn.Module, width: int) -> Tensor:
    """What a normalization multiplies with: its output on a vector of ones and minus ones, whose mean square is 1."""
    weight: Any = norm.weight
    x = torch.ones(1, width).to(weight)
    x[:, 1::2] = -1
    got: Tensor = (norm(1e3 * x) * x)[0].float().cpu()
    return got


def _turn(module: Any, r: Tensor, reads: bool) -> None:
    """``W R`` for readers and embeddings, ``R^T W`` for writers, in float64."""
    own = r.to(module.weight.device)
    w = module.weight.double()
    module.weight.copy_(w @ own if reads else own.T @ w)


def _turn_blocks(layer: nn.Linear, h: Tensor, rows: bool) -> None:
    own, size = h.to(layer.weight.device), len(h)
    w = layer.weight.double()
    if rows:
        layer.weight.copy_(torch.einsum("hk,bho->bko", own, w.view(-1, size, w.shape[1])).reshape(w.shape))
        if layer.bias is not None:
            layer.bias.copy_((layer.bias.double().view(-1, size) @ own).flatten())
    else:
        layer.weight.copy_((w.view(w.shape[0], -1, size) @ own).reshape(w.shape))


def _copies(model: nn.Module) -> Kept:
    return [(p, p.detach().clone()) for p in model.parameters()]


def _refused(expected: str, got: str) -> AttachError:
    return AttachError(explain("rotate", expected, got, "Use smoothquant."))


__all__ = ["random_hadamard", "rotate"]
