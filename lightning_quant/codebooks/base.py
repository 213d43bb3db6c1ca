"""The contract of codebooks: grids whose levels are not evenly spaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_quant.errors import explain


@dataclass(frozen=True)
class Codebook(ABC):
    """Levels, up to a scale: a code is the place of its level in ascending order.

    Class attributes: ``widths``, the bit widths it exists for; ``covers``, whether a scale set by the largest
    magnitude puts all data between the outermost levels; ``follows``, whether weights' scales are taken from the
    largest magnitude at every step unless the user says otherwise, as storage formats do.
    """

    widths: ClassVar[tuple[float, ...]] = ()
    covers: ClassVar[bool] = True
    follows: ClassVar[bool] = False

    @abstractmethod
    def levels(self, bits: float, signed: bool) -> tuple[float, ...]:
        """Levels in ascending order, at most 2^bits of them, 0 among them unless the paper leaves it out.

        Args:
            bits: Width of a code.
            signed: Whether negative levels exist (False: for activations that are never negative).
        """

    def scale(self, absmax: Tensor, top: float) -> Tensor:
        """Scale, real, for data of this largest magnitude; ``top`` is the largest level."""
        return absmax / top

    def check(self, bits: float, where: str) -> None:
        """Refuse a width the codebook does not exist for."""
        if bits not in self.widths:
            cure = f"Write for example w{self.widths[0]:g} in the scheme."
            raise ValueError(explain(where, f"one of {self.widths} bits", f"{bits:g}", cure))
