"""Memory, operations, bytes and time of each layer: ``time = max(operations / peak, bytes / bandwidth)``.

Weights, keys and values, inputs and outputs pass through memory once per operation, at their stored width; layers do
not overlap.  Real kernels are slower than both roofs, and what happens between them adds to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lightning_quant.layers import float_dtype
from lightning_quant.roofline.counting import Counted, Use
from lightning_quant.roofline.hardware import Hardware
from lightning_quant.roofline.phases import Load, count_phases, load_for
from lightning_quant.roofline.stored import Stored, stored
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig


@dataclass(frozen=True)
class Cost:
    """What layers cost in one phase.

    Attributes:
        operations: Floating-point or integer ones; a multiply-accumulate is two.
        bytes: To and from memory.
        compute_seconds: Of the operations, at the peak.
        memory_seconds: Of the bytes, at full bandwidth.
        seconds: Of both, each operation taking the longer of the two.
    """

    operations: float = 0.0
    bytes: float = 0.0
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes if self.bytes else 0.0

    @property
    def bound(self) -> str:
        """What it waits for: ``memory`` or ``compute``."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "intensity": self.intensity, "bound": self.bound}


@dataclass(frozen=True)
class Layer:
    """A module with weights or attention, or several of one kind.

    Attributes:
        path: Its path; of several ``*`` in place of numbers.
        count: How many.
        arithmetic: Types of the operands that it multiplies.
        parts: Bytes of its stored weights: codes, scales, zero points, shapes, float.
        cache: Bytes of its keys and values after ``context`` tokens and the one that is written.
        phases: Its cost in each phase that calls it.
    """

    path: str
    count: int = 1
    arithmetic: tuple[str, ...] = ()
    parts: dict[str, int] = field(default_factory=dict)
    cache: float = 0.0
    phases: dict[str, Cost] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of its stored weights."""
        return sum(self.parts.values())

    def __add__(self, other: Layer) -> Layer:
        phases = {name: self.phases.get(name, Cost()) + other.phases.get(name, Cost()) for name in _names(self, other)}
        parts = {name: self.parts.get(name, 0) + other.parts.get(name, 0) for name in {**self.parts, **other.parts}}
        kinds = tuple(dict.fromkeys((*self.arithmetic, *other.arithmetic)))
        return Layer(self.path, self.count + other.count, kinds, parts, self.cache + other.cache, phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        own = {"path": self.path, "count": self.count, "arithmetic": [*self.arithmetic], "weight_bytes": self.bytes}
        phases = {name: cost.to_dict() for name, cost in self.phases.items()}
        return {**own, "parts": self.parts, "cache_bytes": self.cache, "phases": phases}


def _names(*layers: Layer) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer.phases))


@dataclass(frozen=True)
class Roofline:
    """What ``roofline`` found.

    Attributes:
        model: Name of the class.
        scheme: As it was given.
        hardware: What it would run on.
        load: What is asked of it.
        kv_bits: Width of keys and values.
        dtype: Of what is not quantized.
        layers: In the model's order.
        notes: What is computed otherwise than the scheme says, and why.
    """

    model: str
    scheme: str
    hardware: Hardware
    load: Load
    kv_bits: int
    dtype: str
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Layer:
        """All layers as one."""
        return replace(_sum(list(self.layers)), path="all")

    @property
    def groups(self) -> list[Layer]:
        """Layers whose paths differ in numbers only, together."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", layer.path), []).append(layer)
        return [replace(_sum(layers), path=path) for path, layers in found.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        hardware = {name: getattr(self.hardware, name) for name in self.hardware.__dataclass_fields__}
        return {
            "model": self.model,
            "scheme": self.scheme,
            "dtype": self.dtype,
            "kv_bits": self.kv_bits,
            "hardware": {**hardware, "peak": dict(self.hardware.peak)},
            "load": dict(vars(self.load)),
            "notes": list(self.notes),
            "total": self.total.to_dict(),
            "groups": [layer.to_dict() for layer in self.groups],
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __str__(self) -> str:
        """Tables."""
        from lightning_quant.roofline.table import text

        return text(self)


def _sum(layers: list[Layer]) -> Layer:
    first, *rest = layers
    for layer in rest:
        first = first + layer
    return first


def roofline(
    model: nn.Module,
    config: QuantConfig | None,
    hardware: Hardware,
    load: Load | None = None,
    kv_bits: int | None = None,
    scheme: str = "",
) -> Roofline:
    """Predict what a model would take under a scheme: weights as its export stores them, time as hardware allows.

    Layers with 8-bit inputs multiply in int8 or fp8, all others in the dtype of the model, as do all of them where the
    hardware has no such arithmetic.

    Args:
        model: A float model of transformers on the meta device, e.g. from ``open_model``.
        config: What is quantized and how; None: nothing.
        hardware: What it runs on: one of ``HARDWARE``, ``measure()``, or your own.
        load: Batch, prompt and context.
        kv_bits: Width of keys and values; None: 8 where the config quantizes them, else 16.
        scheme: Name of the config for the report.

    Raises:
        ValueError: The model cannot be counted, or not be exported so; the hardware lacks the model's dtype.
    """
    load = load or load_for(model)
    bits = kv_bits or (8 if config is not None and config.kv_cache else 16)
    dtype = float_dtype(model)
    phases = count_phases(model, load)
    sizes = stored(model, config)
    costs = _Costs(model, sizes, hardware, dtype, bits)
    layers = costs.layers(phases)
    name = str(dtype).removeprefix("torch.")
    return Roofline(type(model).__name__, scheme, hardware, load, bits, name, layers, tuple(costs.notes))


class _Costs:
    """Turns uses into costs."""

    def __init__(self, model: nn.Module, sizes: Stored, hardware: Hardware, dtype: torch.dtype, kv_bits: int) -> None:
        self.sizes, self.hardware, self.kv_bytes = sizes, hardware, kv_bits / 8
        self.dtype, self.width = str(dtype).removeprefix("torch."), dtype.itemsize
        self.notes: dict[str, None] = {}
        self.order = [path for path, _ in model.named_modules(remove_duplicate=False)]
        names = dict(model.named_parameters(remove_duplicate=False))
        kept = {id(names[name]): name for name in sizes.tensors if name in names}
        self.stored = {name: kept[id(p)] for name, p in names.items() if id(p) in kept}  # a tied name -> the stored one

    def layers(self, phases: dict[str, Counted]) -> tuple[Layer, ...]:
        """The modules that hold something or do something, in the model's order."""
        found: dict[str, Layer] = {}
        for name, parts in self.sizes.tensors.items():
            path = name.rpartition(".")[0]
            found[path] = found.get(path, Layer(path, count=0)) + Layer(path, parts=parts)
        for phase, counted in phases.items():
            for use in counted.uses:
                cost, arithmetic = self.of(use)
                cache = use.cached * self.kv_bytes if use.fresh and phase == list(phases)[-1] else 0.0
                one = Layer(use.path, 0, (arithmetic,) if use.macs else (), cache=cache, phases={phase: cost})
                found[use.path] = found.get(use.path, Layer(use.path)) + one
            read = {self.stored.get(name, name) for use in counted.uses for name in use.weights}
            for name in self.sizes.tensors:  # what is not multiplied: normalizations and their like
                path = name.rpartition(".")[0]
                if path in counted.called and name not in read:
                    found[path] += Layer(path, 0, phases={phase: self._cost(0, self._bytes(name), "")})
        return tuple(replace(found[path], count=1) for path in self.order if path in found)

    def _bytes(self, name: str) -> int:
        return sum(self.sizes.tensors.get(self.stored.get(name, name), {}).values())

    def of(self, use: Use) -> tuple[Cost, str]:
        """Cost of one use and the arithmetic it is computed in."""
        spec = self.sizes.inputs.get(use.path)
        wanted = _arithmetic(spec, self.dtype)
        kind = self.hardware.arithmetic(wanted, self.dtype)
        if kind != wanted:
            self.notes[f"{self.hardware.name} has no {wanted} arithmetic: computed in {kind}"] = None
        weights = use.share * sum(self._bytes(name) for name in use.weights)
        inputs = use.inputs * (self.width if spec is None else spec.bits / 8)
        cache = use.cached * self.kv_bytes + use.fresh * self.kv_bytes
        return self._cost(2 * use.macs, weights + inputs + use.outputs * self.width + cache, kind), kind

    def _cost(self, operations: float, size: float, kind: str) -> Cost:
        compute = operations / self.hardware.peak[kind] if operations else 0.0
        memory = size / self.hardware.bandwidth
        return Cost(operations, size, compute, memory, max(compute, memory))


def _arithmetic(inputs: TensorSpec | None, dtype: str) -> str:
    """Type in which a layer with such inputs multiplies."""
    if inputs is None:
        return dtype
    if inputs.grid == "int":
        return "int8"
    return "fp8" if inputs.bits == 8 else "fp4"
