"""The roundings by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lightning_quant.errors import unknown
from lightning_quant.rounding.adaquant import AdaQuant
from lightning_quant.rounding.adaround import AdaRound
from lightning_quant.rounding.brecq import Brecq
from lightning_quant.rounding.gptq import Gptq
from lightning_quant.rounding.lapq import LapqReport, lapq
from lightning_quant.rounding.qdrop import QDrop
from lightning_quant.rounding.rtn import Rtn
from lightning_quant.rounding.unit import Errors, Unit


class Rounding(Protocol):
    """What the driver asks of a rounding: see ``Rtn``."""

    @property
    def needs_float(self) -> bool:
        """Whether the float model's activations are needed."""

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss's gradients are."""

    def __call__(self, unit: Unit) -> Errors:
        """Write weights on their grids; relative squared errors of outputs, to nearest and as chosen, by path."""


ROUNDINGS: dict[str, type[Rounding]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "adaround": AdaRound,
    "adaquant": AdaQuant,
    "brecq": Brecq,
    "qdrop": QDrop,
}

# What sets ranges with the whole model in view: called with a model with quantizers and batches; other parameters are
# its options.
TUNINGS: dict[str, Callable[..., LapqReport]] = {"lapq": lapq}


def build_rounding(name: str, options: Mapping[str, Any]) -> Rounding:
    """A rounding by name, with settings.

    Raises:
        ValueError: Unknown name or setting.
    """
    if name not in ROUNDINGS:
        raise ValueError(unknown("rounding", name, ROUNDINGS, "rounding"))
    known = list(inspect.signature(ROUNDINGS[name]).parameters)
    for option in options:
        if option not in known:
            raise ValueError(unknown("option", option, known or ["(none)"], f"rounding {name!r}"))
    return ROUNDINGS[name](**options)
