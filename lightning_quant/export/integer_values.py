"""Integers with a real scale, the nodes that compute with them, and what only moves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import explain
from lightning_quant.integer import WORD

INT32 = 2**WORD - 1


@dataclass(frozen=True)
class Scaled:
    """Integers and what one of them is worth.

    Attributes:
        integer: int64, holding what hardware keeps in int32 or less; zero points are subtracted.
        scale: float64, real, broadcastable to ``integer``.
        bound: Largest magnitude that any input of the model can lead to.
    """

    integer: Tensor
    scale: Tensor
    bound: int


Value = Scaled | Tensor | None


@dataclass(frozen=True)
class Step:
    """One node of the file.

    Attributes:
        name: Its name, which begins with the module's path.
        operator: Name of the operator.
        settings: Its attributes.
        headroom: Whether constants are rounded to as fine a scale as int32 allows.
    """

    name: str
    operator: str
    settings: dict[str, Any]
    headroom: bool = True

    def refuse(self, expected: str, got: object, cure: str) -> ValueError:
        """An error that names the node."""
        return ValueError(explain(f"{self.name} ({self.operator})", expected, got, cure))

    def scaled(self, x: Value) -> Scaled:
        """The value, unless it is one of floats."""
        if not isinstance(x, Scaled):
            cure = "Quantize weight and input of every layer (no a16, no rule with weight=None, first_last='inherit')."
            raise self.refuse("integers to compute with", "floats", cure)
        return x

    def whole_scale(self, x: Scaled) -> Tensor:
        """The scale of a tensor that has one, 0-dim."""
        if x.scale.numel() != 1:
            cure = "Train with quantized activations, e.g. w8a8, and operators=8."
            raise self.refuse("an input that was rounded to one grid", "sums with a scale per channel", cure)
        return x.scale.reshape(())

    def line(self, x: Scaled, axis: int) -> Tensor:
        """Scales along one dimension, where they differ along no other."""
        rows = x.scale.expand(x.integer.shape).movedim(axis, 0).flatten(1)
        if not bool((rows == rows[:, :1]).all()):
            got = f"scales that differ along other dimensions than {axis}"
            raise self.refuse("one scale per output channel", got, "Train weights with -channel or -tensor.")
        return rows[:, 0]

    def fits(self, x: Scaled) -> Scaled:
        """The value, if int32 holds it whatever the input is."""
        if x.bound > INT32:
            cure = "Use fewer bits, a layer that sums over less, or operators=8 for what is added."
            raise self.refuse("sums that fit int32", f"up to {x.bound}", cure)
        return x

    def finer(self, x: Scaled, constant: Tensor | float = 0.0) -> Scaled:
        """The same values in units that leave int32 just room for a constant beside them.

        Units shrink by 2^k where bits are free, and grow where the constant needs more than int32 has: in a channel of
        tiny weights, whose products then do not matter.

        Args:
            x: The value.
            constant: Magnitudes, real, broadcastable to the value.
        """
        need = x.bound + constant / x.scale
        free = WORD - 1 - torch.frexp(need.max() if x.scale.numel() == 1 else need).exponent
        return _shifted(x, free if self.headroom else free.clamp(max=0))

    def coarser(self, x: Scaled, count: int) -> Scaled:
        """The value in units so large that int32 holds ``count`` of them added up."""
        return _shifted(x, torch.tensor(WORD - (x.bound * count).bit_length()).clamp(max=0))


def _shifted(x: Scaled, bits: Tensor) -> Scaled:
    """The value in units 2^bits times smaller; rounded, half up, where they grow."""
    left, right = bits.clamp(min=0), (-bits).clamp(min=0)
    integer = ((x.integer << left) + ((1 << right) >> 1)) >> right
    return Scaled(integer, x.scale * torch.exp2(-bits.double()), math.ceil(x.bound * 2.0 ** int(bits.max())))


def moved(x: Value, move: Callable[[Tensor], Tensor], fill: Callable[[Tensor], Tensor] | None = None) -> Value:
    """Apply to integers, and to scales where there are several, what only moves elements."""
    if not isinstance(x, Scaled):
        assert x is not None
        return move(x)
    scale = x.scale.reshape(()) if x.scale.numel() == 1 else (fill or move)(x.scale.expand(x.integer.shape))
    return replace(x, integer=move(x.integer), scale=scale)


def paddings(step: Step, spatial: int) -> list[int]:
    """The node's padding: all beginnings, then all ends."""
    if step.settings.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise step.refuse("explicit padding", step.settings["auto_pad"], "Use numbers for the padding.")
    return list(step.settings.get("pads", [0] * (2 * spatial)))


def ends(pads: Sequence[int]) -> list[int]:
    """ONNX's (all beginnings, all ends) in PyTorch's order: last dimension first, beginning and end of each."""
    half = len(pads) // 2
    return [n for i in reversed(range(half)) for n in (pads[i], pads[half + i])]
