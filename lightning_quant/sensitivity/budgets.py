"""What a budget limits: stored bits, bytes, bit operations or seconds; and what layers cost of each."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.spec import LayerRule

FLOAT_BITS = 16  # of weights, inputs and scales that are not quantized, as they are deployed
SCALE_BITS = {"e8m0": 8, "e4m3": 8}
UNITS: dict[str, tuple[str, float]] = {
    **dict.fromkeys(("bit", "bits"), ("bits", 1)),
    **{unit: ("bytes", 1000.0**i) for i, unit in enumerate(("bytes", "kb", "mb", "gb"))},
    **{unit: ("bytes", 1024.0**i) for i, unit in enumerate(("kib", "mib", "gib"), 1)},
    **{unit: ("bops", 1000.0**i) for i, unit in enumerate(("bops", "kbops", "mbops", "gbops", "tbops"))},
    **{unit: ("seconds", 1000.0**-i) for i, unit in enumerate(("s", "ms", "us"))},
}
EXAMPLES = "4.5bits, 120MiB, 12GBOPs or 3ms"

Seconds = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Budget:
    """An upper limit.

    Attributes:
        kind: ``bits`` (stored per weight of the layers chosen for, scales included), ``bytes`` (of the whole model),
            ``bops`` (bit operations of the whole model per sample) or ``seconds`` (of the layers chosen for).
        value: In that unit.
    """

    kind: str
    value: float

    @staticmethod
    def parse(given: Budget | str | float) -> Budget:
        """From words; a bare number is bits per weight.

        >>> Budget.parse("4.5bits"), Budget.parse("2 MiB")
        (Budget(kind='bits', value=4.5), Budget(kind='bytes', value=2097152.0))

        Raises:
            ValueError: No number, no unit or an unknown one, or nothing above 0.
        """
        if isinstance(given, Budget):
            return given
        found = re.fullmatch(r"([\d.]+(?:e[-+]?\d+)?)\s*([a-z]+)", str(given).strip().lower())
        if isinstance(given, (int, float)):
            kind, value = "bits", float(given)
        elif found is None or found[2] not in UNITS or found[1].count(".") > 1:
            cure = "Units are bits, bytes, kB, MB, GB, KiB, MiB, GiB, BOPs, kBOPs, MBOPs, GBOPs, TBOPs, us, ms and s."
            raise ValueError(explain("budget", f"a number and a unit, such as {EXAMPLES}", repr(given), cure))
        else:
            kind, size = UNITS[found[2]]
            value = float(found[1]) * size
        if not 0 < value < math.inf:
            raise ValueError(explain("budget", "a number above 0", repr(given), f"Use for example {EXAMPLES}."))
        return Budget(kind, value)

    def __str__(self) -> str:
        return describe(self.kind, self.value)


def describe(kind: str, value: float) -> str:
    """An amount in words.

    >>> describe("bytes", 3 * 2**20), describe("bops", 2.5e9), describe("seconds", 0.002)
    ('3 MiB', '2.5 GBOPs per sample', '2 ms')
    """
    if kind == "bits":
        return f"{value:.4g} bits per weight"
    steps: dict[str, tuple[tuple[float, str], ...]] = {
        "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1, "bytes")),
        "bops": ((1e12, "TBOPs"), (1e9, "GBOPs"), (1e6, "MBOPs"), (1e3, "kBOPs"), (1, "BOPs")),
        "seconds": ((1, "s"), (1e-3, "ms"), (1e-6, "us")),
    }
    size, unit = next((step for step in steps[kind] if value >= step[0]), steps[kind][-1])
    return f"{value / size:.4g} {unit}" + (" per sample" if kind == "bops" else "")


def stored_bits(layer: QuantLayer) -> float:
    """Bits of a layer's codes, of their scales and of zero points or offsets; without a bias.

    Codes count with their width and scales with 16 bits (8 in formats of 8 bits), as dense packing holds them; a
    format that pads 3 bits to 4 takes more.
    """
    q = layer.weight_quant
    scales = math.prod(q.scale_shape)
    bits = layer.weight.numel() * q.spec.bits + scales * SCALE_BITS.get(q.spec.scale_format, FLOAT_BITS)
    if not q.spec.symmetric:
        bits += scales * (FLOAT_BITS if q.spec.range == "offset" else q.spec.bits)
    return float(bits)


def held_bytes(model: nn.Module, left_out: Iterable[QuantLayer]) -> int:
    """Bytes of the model's parameters and stored buffers, each tensor once, without quantizers and these weights."""
    skipped = {id(layer.weight) for layer in left_out}
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            skipped.update(id(t) for t in (*module.parameters(), *module.buffers()))
    buffers = [
        b
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None and name not in m._non_persistent_buffers_set
    ]
    own = {id(t): t for t in (*model.parameters(), *buffers) if id(t) not in skipped}
    return sum(t.numel() * t.element_size() for t in own.values())


def bit_operations(macs: float, layer: QuantLayer | None) -> float:
    """Multiply-accumulates times width of weights times width of inputs; None: a layer in float, 16 x 16 bits.

    Source: Yao et al., "HAWQ-V3", ICML 2021, arXiv:2011.10680.
    """
    if layer is None:
        return macs * FLOAT_BITS * FLOAT_BITS
    inputs = FLOAT_BITS if layer.input_quant is None else layer.input_quant.spec.bits
    return macs * layer.weight_quant.spec.bits * inputs


def read_seconds(path: str | Path) -> Seconds:
    """A table of latencies, JSON: ``{"layer or pattern": {"w4a16-g32": 1.2e-5, ...}, ...}``.

    Raises:
        ValueError: Another form, or numbers that are no times.
    """
    where = str(path)
    cure = 'Write {"model.layers.*.up_proj": {"w4a16-g32": 1.2e-5, "w8a16": 2.1e-5}, ...}, in seconds.'
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(explain(where, "JSON", str(error), cure)) from error
    if not isinstance(data, Mapping) or not all(isinstance(row, Mapping) for row in data.values()):
        raise ValueError(explain(where, "seconds for each layer and scheme", "another form", cure))
    for match, row in data.items():
        for scheme, value in row.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(explain(f"{where}: {match}, {scheme}", "a number of seconds", repr(value), cure))
    return data


def seconds_of(table: Seconds, path: str, schemes: Iterable[str]) -> list[float]:
    """A layer's latency under each scheme; the first pattern that matches counts, as with rules.

    Raises:
        ValueError: The table does not say.
    """
    row = next((row for match, row in table.items() if LayerRule(match).matches(path)), None)
    cure = "Add it, in seconds; a pattern such as *.up_proj speaks of several layers."
    if row is None:
        raise ValueError(explain(f"latency of {path}", "seconds for this layer", "none in the table", cure))
    lacking = [scheme for scheme in schemes if scheme not in row]
    if lacking:
        got = f"none for {', '.join(lacking)}"
        raise ValueError(explain(f"latency of {path}", "seconds for every scheme", got, cure))
    return [float(row[scheme]) for scheme in schemes]
