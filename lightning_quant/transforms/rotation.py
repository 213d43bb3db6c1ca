"""Rotations fused into weights: of the residual stream, and of each head's values; the float function stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import AttachError, explain
from lightning_quant.transforms.pairs import Call, Pair, is_consumer, whole
from lightning_quant.transforms.rescale import (
    TOLERANCE,
    Applied,
    TransformReport,
    difference,
    rescale,
    shared_weight,
)

NEAR_ZERO = 1e-6
# Called with the name of a rotation ("" is the stream's, else the path of the layer that makes the values) and its
# size; gives an orthogonal matrix (size, size) in float64.
Choose = Callable[[str, int], Tensor]


@dataclass(frozen=True)
class Rotation:
    """A rotation R that was fused.

    Attributes:
        name: "" is the residual stream's, else the path of the layer that makes the values.
        size: Of R; a width of several times as much is turned block by block, as heads are.
        inputs: Paths of layers whose weight became ``W R``, and of embeddings, whose rows turn alike.
        outputs: Paths of layers whose weight became ``R^T W`` and whose bias ``R^T b``.
    """

    name: str
    size: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def turn_inputs(weight: Tensor, r: Tensor) -> Tensor:
    """``W R``, block by block of R's size: weight (out, in), r (size, size)."""
    return (weight.reshape(len(weight), -1, len(r)) @ r).reshape(weight.shape)


def turn_outputs(x: Tensor, r: Tensor) -> Tensor:
    """``R^T x``, block by block of R's size: x (out, in), or a bias (out,)."""
    return (r.T @ x.reshape(-1, len(r), x[0].numel())).reshape(x.shape)


@torch.no_grad()
def fuse(
    model: nn.Module, pairs: list[Pair], batches: list[Any], choose: Choose, heads: bool, limit: float, what: str
) -> tuple[TransformReport, list[Rotation]]:
    """Rotate what can be rotated, in place, and prove that the output stays; what moves it is put back.

    Args:
        model: In float.
        pairs: What reads what in it.
        batches: The proof for the stream.
        choose: Gives the matrices.
        heads: Rotate values within heads as well.
        limit: How far the output may move, relative to its largest value, for the stream to stay rotated.
        what: Name of the transform, for the report and its messages.
    """
    report, done = TransformReport(), []
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    try:
        done.append(_stream(model, [whole(model, b)[1] for b in batches], pairs, choose, report, limit, what))
    except AttachError as error:
        for tensor, value in kept:
            tensor.copy_(value)
        report = TransformReport(refused={type(model).__name__: str(error)})
    for pair in pairs if heads else ():
        done += _values(model, pair, choose, report, what)
    return report, done


def _stream(
    model: nn.Module,
    runs: list[Call],
    pairs: list[Pair],
    choose: Choose,
    report: TransformReport,
    limit: float,
    what: str,
) -> Rotation:
    """Rotate the residual stream; raises where the model has no such stream, or the output moves."""

    def refused(expected: str, got: str, cure: str = "Use smoothquant.") -> AttachError:
        return AttachError(explain(what, expected, got, cure))

    norms = {p.producer: p for p in pairs if getattr(model.get_submodule(p.producer).weight, "ndim", 0) == 1}
    widths = {p.channels for p in norms.values()}
    if len(widths) != 1:
        raise refused("normalizations of one width before all layers", f"widths {sorted(widths)}")
    width, start = widths.pop(), [run() for run in runs]
    readers = {path for pair in norms.values() for path in pair.consumers}
    writers = {p: m for p, m in model.named_modules() if p not in readers and _writes(m, width)}
    for pair in norms.values():
        folded = TransformReport()
        norm: Any = model.get_submodule(pair.producer)
        if norm._parameters.get("bias") is not None or not _is_rms(norm, width):
            raise refused("RMS normalization without a bias", f"{type(norm).__name__} at {pair.producer}")
        scale = _scale(norm, width)
        if bool((scale.abs() < NEAR_ZERO).any()):
            raise refused("normalization scales away from 0", f"{float(scale.abs().min()):.1e} at {pair.producer}")
        if not torch.equal(scale, torch.ones_like(scale)) and not rescale(model, pair, scale, what, folded):
            raise refused("normalizations whose scale can move on", folded.refused[pair.producer])
    for path in readers:
        if not isinstance(model.get_submodule(path), nn.Linear):
            raise refused("linear layers that read the stream", f"{type(model.get_submodule(path)).__name__} at {path}")
    seen: set[int] = set()
    inputs: list[str] = []
    outputs: list[str] = []
    for path in [*sorted(readers), *writers]:
        module: Any = model.get_submodule(path)
        if id(module.weight) not in seen:  # the head's may be the embedding's
            seen.add(id(module.weight))
            (inputs if path in readers or isinstance(module, nn.Embedding) else outputs).append(path)
    rotation = Rotation("", width, tuple(inputs), tuple(outputs))
    _turn(model, rotation, choose("", width))
    moved = max(difference(y, run()) for y, run in zip(start, runs, strict=True))
    if moved > limit:
        cure = "Use smoothquant; or where many layers only add up rounding, set tolerance higher."
        raise refused(f"an output that stays within {limit:.1e} of its largest value", f"a change of {moved:.1e}", cure)
    report.applied.append(Applied(f"residual stream of {width}", tuple(sorted({*readers, *writers})), what, moved))
    return rotation


def _values(model: nn.Module, pair: Pair, choose: Choose, report: TransformReport, what: str) -> list[Rotation]:
    """Rotate values within heads, if this pair is one of values and attention's output: trying tells."""
    first: Any = model.get_submodule(pair.producer)
    if not isinstance(first, nn.Linear) or len(pair.consumers) != 1:
        return []
    ((path, index),) = pair.consumers.items()
    second: Any = model.get_submodule(path)
    size = _head_size(model, pair, index)
    if not isinstance(second, nn.Linear) or size is None or shared_weight(model, [first, second]):
        return []
    kept = [(p, p.detach().clone()) for m in (first, second) for p in m.parameters()]
    start, rotation = pair.part(), Rotation(pair.producer, size, (path,), (pair.producer,))
    _turn(model, rotation, choose(pair.producer, size))
    moved = difference(start, pair.part())
    if moved <= TOLERANCE:
        report.applied.append(Applied(pair.producer, (path,), what, moved))
        return [rotation]
    for tensor, value in kept:
        tensor.copy_(value)
    return []


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


def _turn(model: nn.Module, rotation: Rotation, r: Tensor) -> None:
    """Fuse one rotation, in float64."""
    for path in rotation.inputs:
        reader: Any = model.get_submodule(path)
        reader.weight.copy_(turn_inputs(reader.weight.double(), r.to(reader.weight.device)))
    for path in rotation.outputs:
        for p in model.get_submodule(path).parameters(recurse=False):
            p.copy_(turn_outputs(p.double(), r.to(p.device)))


__all__ = ["Choose", "Rotation", "fuse", "turn_inputs", "turn_outputs"]
