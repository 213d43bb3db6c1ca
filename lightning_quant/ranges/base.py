"""The contract of ranges: which numbers fix a static grid, and how their gradients arise.

A range turns its own parameters into a scale (and an offset) by differentiable operations; the quantizer's
backward gives the gradient of the scale and autograd carries it on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain

if TYPE_CHECKING:
    from lightning_quant.quantizer import FakeQuantizer
    from lightning_quant.scheme import TensorSpec


@dataclass(frozen=True)
class Range(ABC):
    """How a static grid is held and learned.

    Class attributes: ``interior``, whether values inside the range move the scale (LSQ) or only clipped ones
    (PACT); ``affine``, whether the range has two free ends.
    """

    interior: ClassVar[bool] = True
    affine: ClassVar[bool] = False

    def check(self, spec: TensorSpec, is_weight: bool, where: str) -> None:
        """Refuse a spec this range makes no sense with.

        A range with two free ends uses all codes, whatever ``symmetric`` says, and no level need be 0.
        """
        if self.affine and (spec.grid != "int" or spec.narrow):
            got = f"grid={spec.grid!r}, narrow={spec.narrow}"
            cure = f"Leave grid and narrow out, or range={spec.range!r}."
            raise ValueError(explain(f"{where}: range={spec.range!r}", "all codes of an integer grid", got, cure))

    def initial(self) -> Mapping[str, float]:
        """Names of its tensors, each of the scales' shape, with their value before a range is set."""
        return {"scale": 0.0}

    def state(self, quantizer: FakeQuantizer) -> None:
        """Register the tensors: parameters if they are learned, else buffers."""
        for name, value in self.initial().items():
            start = torch.full(quantizer.scale_shape, value, dtype=quantizer.dtype, device=quantizer.device)
            if quantizer.spec.learn_scale:
                quantizer.register_parameter(name, nn.Parameter(start))
            else:
                quantizer.register_buffer(name, start)

    @abstractmethod
    def set(self, quantizer: FakeQuantizer, low: Tensor, high: Tensor) -> None:
        """Cover [low, high], each (number of scales,), real."""

    @abstractmethod
    def scale(self, quantizer: FakeQuantizer) -> Tensor:
        """The scale, real, in the scales' shape."""

    @abstractmethod
    def zero(self, quantizer: FakeQuantizer) -> Tensor | float:
        """The zero point, in codes."""

    def offset(self, quantizer: FakeQuantizer) -> Tensor | None:
        """Real number that is subtracted before the grid and added after it, in the scales' shape."""
        return None

    @abstractmethod
    def ready(self, quantizer: FakeQuantizer) -> bool:
        """Whether a range has been set."""

    def factor(self, quantizer: FakeQuantizer, x: Tensor) -> float:
        """What the gradients of the scale and of the offset are multiplied with."""
        return 1.0

    def project(self, quantizer: FakeQuantizer) -> None:  # noqa: B027 - most have nothing to mend
        """Bring the parameters back to their domain after an optimizer step."""


def formatted(quantizer: FakeQuantizer, value: Tensor) -> Tensor:
    """A range's number in the format that scales are stored in; the gradient passes as if it were not rounded."""
    if quantizer.grid.scale_format == "float" or not quantizer.spec.learn_scale:  # fixed ones were rounded when set
        return value
    return quantizer.grid.format(value.detach()) + (value - value.detach())


def step_size_factor(quantizer: FakeQuantizer, x: Tensor, top: float) -> float:
    """LSQ's ``1 / sqrt(N * top)``, with N the elements that share a scale (for activations: of one sample)."""
    n = math.prod(x.shape[1:])
    if quantizer.is_weight:
        n = math.prod(quantizer.shape) // math.prod(quantizer.scale_shape)
    return 1 / math.sqrt(max(n, 1) * max(top, 1))
