"""What a processor can do at most: multiply-accumulates of each arithmetic, and bytes to and from memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from lightning_quant.errors import explain, unknown
from lightning_quant.spec import YamlLoader

ARITHMETICS = ("float32", "bfloat16", "float16", "int8", "fp8", "fp4")
EXAMPLE = "{name: x, peak: {bfloat16: 1e14}, bandwidth: 1e12, memory: 8e10, source: its datasheet}"


@dataclass(frozen=True)
class Hardware:
    """A processor and its memory.

    Attributes:
        name: What it is called.
        peak: Dense operations per second (a multiply-accumulate is two) of matrix products, by the type of the operands
            (names of ``ARITHMETICS``).
        bandwidth: Bytes per second to and from memory.
        memory: Bytes of memory; None: not known.
        source: Where the figures come from.
    """

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    memory: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        where = f"hardware {self.name!r}"
        if not isinstance(self.peak, Mapping) or not self.peak:
            cure = f"Write for example {EXAMPLE}."
            raise ValueError(explain(f"{where}: peak", "operations per second by type", repr(self.peak), cure))
        for name in self.peak:
            if name not in ARITHMETICS:
                raise ValueError(unknown("type", name, ARITHMETICS, f"{where}: peak"))
        for name, value in (*self.peak.items(), ("bandwidth", self.bandwidth), ("memory", self.memory or 1)):
            if isinstance(value, (str, bool)) or not 0 < value < float("inf"):
                cure = "Give it in operations or bytes per second, or bytes."
                raise ValueError(explain(f"{where}: {name}", "a number above 0", repr(value), cure))

    def arithmetic(self, wanted: str, usual: str) -> str:
        """The type in which products of ``wanted`` are computed here: itself, or the ``usual`` one.

        Raises:
            ValueError: Neither is here.
        """
        found = next((name for name in (wanted, usual) if name in self.peak), None)
        if found is None:
            where, cure = f"hardware {self.name!r}", f"Choose another dtype, or add {usual} to its peak."
            raise ValueError(explain(where, f"a peak for {usual}", sorted(self.peak), cure))
        return found


def load_hardware(path: str | Path) -> Hardware:
    """Read a YAML file with the fields of ``Hardware``.

    Raises:
        ValueError: Something else is in it.
        OSError: It cannot be read.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(explain(str(path), "YAML", " ".join(str(error).split())[:200], f"Write {EXAMPLE}.")) from error
    names = [f.name for f in fields(Hardware)]
    if not isinstance(data, Mapping) or not {"peak", "bandwidth"} <= {*data}:
        raise ValueError(explain(str(path), "a mapping with peak and bandwidth", repr(data)[:80], f"Write {EXAMPLE}."))
    for key in data:
        if key not in names:
            raise ValueError(unknown("key", key, names, str(path)))
    return Hardware(**{"name": Path(path).stem, "source": str(path), **data})


# Peaks are dense: half of what datasheets give with sparsity.  A cache or a lower clock under load is not in them.
HARDWARE: dict[str, Hardware] = {
    "a100": Hardware(
        "A100 80GB SXM",
        {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12},
        2039e9,
        80e9,
        "NVIDIA A100 80GB datasheet (SXM)",
    ),
    "h100": Hardware(
        "H100 SXM",
        {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12, "int8": 1979e12, "fp8": 1979e12},
        3.35e12,
        80e9,
        "NVIDIA H100 datasheet (SXM): 1979 bfloat16 and float16, 3958 int8 and fp8 with sparsity, halved",
    ),
    "h200": Hardware(
        "H200 SXM",
        {"float32": 67e12, "bfloat16": 989e12, "float16": 989e12, "int8": 1979e12, "fp8": 1979e12},
        4.8e12,
        141e9,
        "NVIDIA H200 datasheet (SXM): the H100's arithmetic, 141 GB at 4.8 TB/s",
    ),
    "a6000": Hardware(
        "RTX A6000",
        {"float32": 38.7e12, "bfloat16": 154.8e12, "float16": 154.8e12, "int8": 309.7e12},
        768e9,
        48e9,
        "NVIDIA RTX A6000 datasheet: 309.7 bfloat16 with sparsity, halved; int8 twice that (GA102 whitepaper)",
    ),
}
