"""The grid of one kind of tensor, and the scheme strings that write two of them in short."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lightning_quant.errors import explain, unknown

WEIGHT_BITS = (1, 1.58, 2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
GRANULARITIES = ("auto", "tensor", "channel", "group", "pixel", "token")
DEFAULT_GROUP = 128
GRAMMAR = (
    "w{1|1.58|2..8|16}[a{1..8|16}][-g{n}|-channel|-tensor][-asym][-static|-dynamic|-token] or "
    "{fp8|mxfp4|mxfp8|nvfp4}[a16] or nf4[-g{n}], each with [-kv8|-kvfp8] for a model's keys and values"
)
FLOATS: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "grid": "nf4"},
    "fp8": {"bits": 8, "grid": "e4m3"},
    "mxfp4": {"bits": 4, "grid": "e2m1", "scale_format": "e8m0", "granularity": "group", "group_size": 32},
    "mxfp8": {"bits": 8, "grid": "e4m3", "scale_format": "e8m0", "granularity": "group", "group_size": 32},
    "nvfp4": {"bits": 4, "grid": "e2m1", "scale_format": "e4m3", "granularity": "group", "group_size": 16},
}
PRESETS = ("w4a16", "w8a16", "w8a8", "w4a8", *FLOATS)
_HEAD = re.compile(r"w(1\.58|16|[1-8])(?:a(16|[1-8]))?")


@dataclass(frozen=True)
class TensorSpec:
    """The grid, granularity and range of one kind of tensor.

    Args:
        bits: Width of a code; 1.58 is ternary.
        symmetric: Zero point fixed at 0.  ``None``: decided at attach (asymmetric for static
            activations of convolution networks, symmetric elsewhere).
        granularity: ``tensor``, ``channel``, ``group``, ``pixel`` (weights; one scale per place of a
            convolution's kernel, per channel in other layers), ``token`` (activations), or ``auto``:
            weights per channel at 8 bits and in convolution networks, else per group of 128;
            activations per token in networks without convolutions, else per tensor.
        group_size: Elements that share one scale along a row; only with ``group``.
        dynamic: Range taken from the tensor itself at every call; ``None``: decided at attach.
        observer: How a range is read off data when it is not dynamic (a name of ``OBSERVERS``).
        learn_scale: The range is learned; ``None``: as the method prefers.
        grid: What codes stand for: ``int``, ``midrise`` (no level at 0) or a name of ``CODEBOOKS``; ``auto``:
            as the method prefers, else ``int``.
        range: How a static range is held and learned (a name of ``RANGES``); ``auto``: as the method prefers,
            else ``scale``.
        scale_format: Format that scales are rounded to (a name of ``SCALE_FORMATS``).
        narrow: Leave out the most negative code of a symmetric integer grid.
    """

    bits: float = 8
    symmetric: bool | None = None
    granularity: str = "auto"
    group_size: int | None = None
    dynamic: bool | None = None
    observer: str | None = None
    learn_scale: bool | None = None
    grid: str = "auto"
    range: str = "auto"
    scale_format: str = "float"
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise ValueError(
                explain("TensorSpec.bits", f"one of {WEIGHT_BITS}", self.bits, "16 bits is written as None.")
            )
        if self.granularity not in GRANULARITIES:
            raise ValueError(unknown("granularity", self.granularity, GRANULARITIES, "TensorSpec.granularity"))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                explain(
                    "TensorSpec.group_size",
                    "a size with granularity='group' and None otherwise",
                    f"granularity={self.granularity!r}, group_size={self.group_size}",
                    "Set both or neither.",
                )
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                explain("TensorSpec.group_size", "a positive integer", self.group_size, "Use for example 128.")
            )

    @staticmethod
    def parse(text: str) -> TensorSpec:
        """Weight spec from the weight half of the scheme grammar, e.g. ``"w4-g32"``."""
        weight, activation = parse_scheme(text)
        if weight is None or activation is not None:
            raise ValueError(
                explain("TensorSpec.parse", "a weight scheme such as 'w4-g32'", repr(text), "Leave out the 'a' part.")
            )
        return weight


def split_cache(scheme: str) -> tuple[str, str | None]:
    """A scheme without the part that speaks of the cache, and that grid's name.

    >>> split_cache("w4a16-g32-kvfp8"), split_cache("w8a8")
    (('w4a16-g32', 'fp8'), ('w8a8', None))
    """
    head, sign, last = str(scheme).strip().lower().rpartition("-")
    name = {"kv8": "int8", "kvfp8": "fp8"}.get(last)
    return (head, name) if sign and name else (scheme, None)


def parse_scheme(text: str) -> tuple[TensorSpec | None, TensorSpec | None]:
    """Read ``w4a16-g128`` and its kin (case-insensitive) into (weight, activation) specs.

    >>> parse_scheme("W4A16-g32")[0].group_size, parse_scheme("W4A16")[1]
    (32, None)
    """

    def refuse(part: str) -> ValueError:
        return ValueError(
            explain(
                f"scheme {text!r}",
                f"the form {GRAMMAR}",
                f"the part {part!r}",
                f"Ready-made schemes: {', '.join(PRESETS)}; with groups for example w4a16-g32.",
            )
        )

    head, *flags = str(text).strip().lower().split("-")
    weight, activation = _head(head)
    if weight is None or activation is None:
        raise refuse(head)
    for flag in flags:
        if weight["bits"] == 16:
            raise refuse(flag)
        if re.fullmatch(r"g[1-9]\d*", flag) and "granularity" not in weight:
            weight.update(granularity="group", group_size=int(flag[1:]))
        elif flag in ("channel", "tensor") and "granularity" not in weight:
            weight["granularity"] = flag
        elif flag == "asym" and weight["symmetric"] and "grid" not in weight:
            weight["symmetric"] = False
        elif (
            flag in ("static", "dynamic", "token")
            and not {"dynamic", "granularity"} & {*activation}
            and activation["bits"] != 16
        ):
            activation["dynamic"] = flag != "static"
            activation["granularity"] = "tensor" if flag == "static" else "token"
        else:
            raise refuse(flag)
    return (
        None if weight["bits"] == 16 else TensorSpec(**weight),
        None if activation["bits"] == 16 else TensorSpec(**activation),
    )


def _head(head: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Fields of both specs that the first part of a scheme sets; None if it is not one."""
    name = head.removesuffix("a16")
    if name in FLOATS and not (name == "nf4" and head != name):
        weight = {"symmetric": True, **FLOATS[name]}
        return weight, ({"bits": 16} if name == "nf4" or head != name else dict(weight))
    match = _HEAD.fullmatch(head)
    if match is None:
        return None, None
    bits = float(match[1]) if "." in match[1] else int(match[1])
    return {"bits": bits, "symmetric": True}, {"bits": int(match[2] or 16)}
