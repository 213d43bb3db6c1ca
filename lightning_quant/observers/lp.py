"""The range with the least rounding error in a norm between the squared and the largest one."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_quant.observers.mse import Mse


@dataclass(frozen=True)
class Lp(Mse):
    """As ``mse`` for ``sum |x - Q(x; c * range)|^2.4``, c = 1, 0.99, ..., 0.21: large errors count more.

    Source: Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426 (its code), which starts from the best of these.
    """

    candidates: int = 80
    smallest: float = 0.21
    power: float = 2.4
