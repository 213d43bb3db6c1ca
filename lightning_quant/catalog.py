"""What there is to choose from: the table of methods, and one method's formula and settings."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields
from typing import Any

from lightning_quant.codebooks import CODEBOOKS
from lightning_quant.errors import unknown
from lightning_quant.estimators import ESTIMATORS, Estimator
from lightning_quant.granularity import Granularity
from lightning_quant.observers import OBSERVERS
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.ranges import RANGES
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scales import SCALE_FORMATS
from lightning_quant.schedule import CURVES
from lightning_quant.scheme import parse_scheme

ADAM = 4  # value, gradient and two moments
SHAPE = (64, 1024)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: What ``--quant`` takes.
        what: First line of the docstring.
        paper: Authors, year and arXiv number.
        bits: Widths it makes sense for.
        learned: What is trained beside the weights.
        memory: Bytes per weight of what is kept in training for weights, optimizer included.
        state: Names of the tensors kept for weights and for inputs.
        scheme: A scheme it is made for.
    """

    name: str
    what: str
    paper: str
    bits: str
    learned: str
    memory: float
    state: str
    scheme: str


def methods() -> list[Row]:
    """The table of methods, its memory and state read off real quantizers."""
    return [_row(name, kind()) for name, kind in ESTIMATORS.items()]


def _row(name: str, rule: Estimator) -> Row:
    about = rule.about
    weights, inputs = example(rule, True), example(rule, False)
    assert weights is not None
    tensors = dict(weights.named_parameters())
    held = sum(p.numel() * p.element_size() * ADAM for p in tensors.values())
    held += sum(b.numel() * b.element_size() for b in weights.state_dict().values()) - held // ADAM
    kept = [f"w: {', '.join(weights.state_dict())}"] if weights.state_dict() else []
    kept += [f"a: {', '.join(inputs.state_dict())}"] if inputs is not None and inputs.state_dict() else []
    paper = f"{about.paper}, {about.link}" if about.link else about.paper
    memory = held / math.prod(SHAPE)
    return Row(
        name, _first(type(rule)), paper, about.bits, about.learned, memory, "; ".join(kept) or "none", about.scheme
    )


def _first(thing: Any) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(thing) or " ").splitlines()[0]


def example(rule: Estimator, is_weight: bool, shape: tuple[int, ...] = SHAPE) -> FakeQuantizer | None:
    """A quantizer as the method makes it for its own scheme; None if the scheme leaves inputs in float."""
    weight, activation = parse_scheme(rule.about.scheme)
    spec, own = (weight, rule.role(True)) if is_weight else (activation, rule.role(False))
    if spec is None:
        return None
    resolved = (resolve_weight if is_weight else resolve_activation)(spec, shape[0] == 1, own)
    granularity = Granularity(resolved.granularity, 0 if is_weight else None, resolved.group_size or 0)
    if is_weight:
        return FakeQuantizer(resolved, granularity, own, shape=shape)
    return FakeQuantizer(resolved, granularity, own, channels=shape[-1])


def table() -> str:
    """The table as text."""
    rows = [("method", "bits", "learned", "B/weight", "kept", "paper")]
    rows += [(r.name, r.bits, r.learned, f"{r.memory:.3g}", r.state, r.paper) for r in methods()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parts() -> dict[str, dict[str, str]]:
    """What methods are combined with, by the field of ``TensorSpec`` that names it: name -> one line."""
    grids = {"int": "two's complement", "midrise": "two's complement half a step up: no level at 0"}
    grids |= {name: _first(type(book)) for name, book in CODEBOOKS.items()}
    return {
        "observers": {name: _first(kind) for name, kind in OBSERVERS.items()},
        "ranges": {name: _first(kind) for name, kind in RANGES.items()},
        "grids": grids,
        "scale formats": {name: _first(f) if f else "as the weights" for name, f in SCALE_FORMATS.items()},
        "curves of schedules": dict.fromkeys(CURVES, ""),
    }


def describe(name: str) -> str:
    """Formula, settings with defaults, table entry and source of one method.

    Raises:
        ValueError: No such method; the nearest is named.
    """
    rule = find(name)
    row = _row(name, rule)
    lines = [f"{name}: {row.paper}", f"bits {row.bits}; learned: {row.learned}; made for example for {row.scheme}"]
    lines += [f"kept in training: {row.state}; {row.memory:.3g} bytes per weight, optimizer included", ""]
    kinds = dict.fromkeys([type(rule), type(rule.role(True)), type(rule.role(False))])
    for kind in kinds:
        lines += [inspect.getdoc(kind) or "", ""]
    lines += ["Defaults:"] + [f"  {f.name} = {getattr(rule, f.name)!r}" for f in fields(rule) if f.init]
    return "\n".join(lines if any(f.init for f in fields(rule)) else lines[:-1])


def find(name: str) -> Estimator:
    """The method of that name with its default settings."""
    if name not in ESTIMATORS:
        raise ValueError(unknown("method", name, ESTIMATORS, "lightning-quant methods"))
    return ESTIMATORS[name]()
