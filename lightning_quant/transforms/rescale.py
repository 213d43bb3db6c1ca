"""Move factors per channel from what a producer makes into the weights that read it; the float function stays.

Every change is checked by running the part of the model that holds it, and taken back where the output moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.bypass import evaluating
from lightning_quant.transforms.pairs import Pair, channel_axis

TOLERANCE = 1e-5  # of the output's largest value; what rounding in float32 may move
PLACES = {"2d": 2, "3d": 3}  # dimensions that a normalization of that name wants behind the channels


@dataclass(frozen=True)
class Applied:
    """One change.

    Attributes:
        producer: Path of what was divided.
        consumers: Paths of what was multiplied.
        what: The transform.
        difference: Largest change of the float output, relative to its largest value.
    """

    producer: str
    consumers: tuple[str, ...]
    what: str
    difference: float


@dataclass
class TransformReport:
    """What was changed, and which sites were left alone and why.

    Attributes:
        applied: The changes of transforms.
        refused: Path of a site -> why it was left alone.
        chosen: Reports of steps that ran with quantizers in place, each with a ``summary``.
        waiting: Names of such steps that have not run yet.
    """

    applied: list[Applied] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    chosen: list[Any] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """The largest one."""
        return max((a.difference for a in self.applied), default=0.0)

    def __str__(self) -> str:
        """One line per transform, and one per kind of site that was refused; sites that differ in a number share it."""
        kinds = list(dict.fromkeys(a.what for a in self.applied))
        lines = []
        for kind in kinds:
            own = [a.difference for a in self.applied if a.what == kind]
            lines.append(f"{kind}: {len(own)} sites, output changed by {max(own):.1e}")
        merged: dict[tuple[str, str], int] = {}
        for path, why in self.refused.items():
            key = tuple(".".join("*" if part.isdigit() else part for part in text.split(".")) for text in (path, why))
            merged[key] = merged.get(key, 0) + 1  # type: ignore[index, arg-type]
        lines += [f"  left alone: {count} x {path} ({why})" for (path, why), count in merged.items()]
        lines += [report.summary() for report in self.chosen]
        lines += [f"{name}: waits for training, evaluation, saving or an export" for name in self.waiting]
        return "\n".join(lines) or "nothing to do"

    def add(self, other: TransformReport) -> None:
        """Take in what another transform did."""
        self.applied += other.applied
        self.refused |= other.refused


def rescale(model: nn.Module, pair: Pair, factors: Tensor, what: str, report: TransformReport) -> bool:
    """Divide a producer's channels and multiply the weights that read them, if that leaves the output as it was.

    Args:
        model: In float.
        pair: A producer with all its consumers.
        factors: Per channel of the producer, positive.
        what: Name of the transform, for the report.
        report: Takes the outcome.

    Returns:
        Whether it was done.
    """
    producer = model.get_submodule(pair.producer)
    layers = {path: model.get_submodule(path) for path in pair.consumers}
    shared = shared_weight(model, [producer, *layers.values()])
    if shared:
        report.refused[pair.producer] = f"{shared} has a weight that another module uses too"
        return False
    tensors = [p for m in (producer, *layers.values()) for p in m.parameters(recurse=False)]
    before, values = pair.part(), [t.detach().clone() for t in tensors]
    moved = float("nan")
    for divide in (_divide, _divide_one_plus):
        if not _applies(divide, producer, factors):
            continue
        with torch.no_grad():
            divide(producer, factors)
            for path, layer in layers.items():
                multiply_inputs(layer, factors[pair.consumers[path]])
        moved = difference(before, pair.part())
        if moved <= TOLERANCE:
            report.applied.append(Applied(pair.producer, tuple(layers), what, moved))
            return True
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
    report.refused[pair.producer] = (
        f"the output would change by {moved:.1e}" if moved == moved else "its output does not scale with its weight"
    )
    return False


def _divide(producer: nn.Module, factors: Tensor) -> None:
    weight: Any = producer.weight
    rows = factors.to(weight)
    if type(producer).__name__ == "Conv1D":
        weight.div_(rows)
    else:
        weight.div_(rows.view(-1, *(1,) * (weight.ndim - 1)))
    bias: Any = producer._parameters.get("bias")
    if bias is not None:
        bias.div_(rows)


def _divide_one_plus(producer: nn.Module, factors: Tensor) -> None:
    """Gemma's normalizations multiply with 1 + w."""
    weight: Any = producer.weight
    weight.copy_((1 + weight.double()) / factors.double() - 1)


def _applies(divide: Any, producer: nn.Module, factors: Tensor) -> bool:
    """Whether dividing the parameters so divides the output, on random inputs."""
    weight: Any = producer.weight
    if weight.ndim > 1:
        return divide is _divide
    axis = channel_axis(producer)
    places = PLACES.get(type(producer).__name__[-2:], 0) if axis == 1 else 0
    x = torch.randn((4, len(factors), *(2,) * places), generator=torch.Generator().manual_seed(0)).to(weight)
    held = {name: p.detach().clone() for name, p in producer._parameters.items() if p is not None}
    with torch.no_grad(), evaluating(producer):
        wide = [1] * x.ndim
        wide[axis] = -1
        want = producer(x) / factors.to(x).view(wide)
        divide(producer, factors)
        got = producer(x)
        for name, value in held.items():
            producer._parameters[name].copy_(value)  # type: ignore[union-attr]
    return bool(difference([want], [got]) < 1e-2)


@torch.no_grad()
def multiply_inputs(layer: nn.Module, factors: Tensor) -> None:
    """Multiply a layer's weight, in place, by a factor for each of its input channels."""
    weight: Any = layer.weight
    scale = factors.to(weight)
    if type(layer).__name__ == "Conv1D":
        weight.mul_(scale.unsqueeze(1))
    elif (groups := int(getattr(layer, "groups", 1))) > 1:  # an output channel's inputs are those of its group
        inputs = scale.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
        weight.mul_(inputs.view(*inputs.shape, *(1,) * (weight.ndim - 2)))
    else:
        weight.mul_(scale.view(1, -1, *(1,) * (weight.ndim - 2)))


def shared_weight(model: nn.Module, modules: Iterable[nn.Module]) -> str | None:
    """Path of the first of these modules whose weight is also another's."""
    owners: dict[int, int] = {}
    paths: Mapping[int, str] = {id(m): path for path, m in model.named_modules()}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    return next((paths[id(m)] for m in modules if owners.get(id(m.weight), 1) > 1), None)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference over all ranks, relative to the largest value; infinite where one is not a number."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            gap = float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp(min=1e-30))
            worst = max(worst, gap if gap == gap else float("inf"))
    if distributed.active():
        device = next((x.device for x in a), torch.device("cpu"))
        worst = float(distributed.reduce(torch.tensor([worst], dtype=torch.float64, device=device), largest=True))
    return worst
