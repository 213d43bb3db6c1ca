"""What a spec leaves open is filled in here, and combinations that make no sense are refused here."""

from __future__ import annotations

from dataclasses import replace

from lightning_quant.codebooks import CODEBOOKS
from lightning_quant.errors import explain
from lightning_quant.estimators import Estimator, overrides
from lightning_quant.grid import UNIFORM, Grid
from lightning_quant.ranges import build_range
from lightning_quant.scheme import DEFAULT_GROUP, TensorSpec
from lightning_quant.targets import Target


def for_target(spec: TensorSpec, target: Target, is_weight: bool, where: str) -> TensorSpec:
    """A spec whose open fields are what a runtime asks for.

    Args:
        spec: As written by the user.
        target: The runtime.
        is_weight: Whether the tensor is a weight.
        where: Path of the tensor, for messages.

    Raises:
        ValueError: A field that is set to something the runtime does not have.
    """

    def refuse(expected: str, got: object, cure: str) -> ValueError:
        return ValueError(explain(f"{where} (target's format: {target.format})", expected, got, cure))

    if is_weight and target.group_size is not None:
        size = target.group_size
        if spec.granularity == "auto":
            spec = replace(spec, granularity="group", group_size=size)
        if spec.granularity == "group" and (spec.group_size or 0) % size:
            cure = f"Write -g{size}, or leave the group out."
            raise refuse(f"groups of {size} or a multiple", spec.group_size, cure)
    if is_weight and target.scale_format not in ("float", spec.scale_format):
        if spec.scale_format != "float":
            raise refuse(f"{target.scale_format} scales", repr(spec.scale_format), "Leave scale_format out.")
        spec = replace(spec, scale_format=target.scale_format)
        if spec.symmetric is False and spec.range == "auto":
            spec = replace(spec, range="offset")  # its blocks hold a real offset instead of a zero point
    if not is_weight and target.static_inputs:
        if spec.dynamic or spec.granularity in ("token", "group"):
            got = f"granularity={spec.granularity!r}, dynamic={spec.dynamic}"
            raise refuse("activations on a constant range", got, "Write -static in the scheme, e.g. w8a8-static.")
        if spec.dynamic is None:
            spec = replace(spec, dynamic=False)
    return spec


def resolve_weight(spec: TensorSpec, convolutional: bool, rule: Estimator, where: str = "weight") -> TensorSpec:
    """Fill in what a weight spec left open.

    Args:
        spec: The weights' spec, perhaps with ``auto`` and None.
        convolutional: Whether the model holds convolutions.
        rule: The weights' estimator.
        where: Path of the tensor, for messages.

    Returns:
        A spec without open fields.  8-bit scales and those of float formats follow the weights at every
        step (absmax); others start from the least squared error and are then learned or kept.

    Raises:
        ValueError: A combination that makes no sense, with its cure.
    """
    spec = rule.prefer(spec, True, where)
    granularity, size = spec.granularity, spec.group_size
    if granularity == "auto":
        granularity = "channel" if spec.bits == 8 or convolutional else "group"
        size = DEFAULT_GROUP if granularity == "group" else None
    if granularity == "token":
        cure = "Use 'channel'."
        raise ValueError(explain(f"{where}: granularity", "tensor, channel or group for weights", "token", cure))
    grid = "int" if spec.grid == "auto" else spec.grid
    dynamic = spec.dynamic
    if dynamic is None:
        follows = CODEBOOKS[grid].follows if grid in CODEBOOKS else spec.bits == 8
        dynamic = follows and not spec.learn_scale and spec.observer is None and spec.range == "auto"
    learned = False if dynamic else rule.learns_scale if spec.learn_scale is None else spec.learn_scale
    out = replace(
        spec,
        symmetric=spec.symmetric is not False,
        granularity=granularity,
        group_size=size,
        dynamic=dynamic,
        observer=spec.observer or ("minmax" if dynamic else "mse"),
        learn_scale=learned,
        grid=grid,
        range="scale" if spec.range == "auto" else spec.range,
    )
    check_combination(out, rule, True, where)
    return out


def resolve_activation(spec: TensorSpec, convolutional: bool, rule: Estimator, where: str = "input") -> TensorSpec:
    """Fill in what an activation spec left open: see ``TensorSpec`` for the defaults and ``resolve_weight``."""
    spec = rule.prefer(spec, False, where)
    dynamic = spec.dynamic
    if dynamic is None:
        dynamic = spec.granularity in ("token", "group") or (
            spec.granularity == "auto" and not convolutional and spec.range == "auto" and not spec.learn_scale
        )
    granularity = spec.granularity
    if granularity == "auto":
        granularity = "token" if dynamic else "tensor"
    if granularity not in ("token", "group", "tensor") or (granularity != "tensor") != dynamic:
        raise ValueError(
            explain(
                f"{where}: TensorSpec for activations",
                "granularity 'token' or 'group' with dynamic=True or 'tensor' with dynamic=False",
                f"{granularity!r} with dynamic={dynamic}",
                "Use -dynamic or -static in the scheme.",
            )
        )
    symmetric = spec.symmetric if spec.symmetric is not None else dynamic or not convolutional
    if dynamic and not symmetric:
        raise ValueError(
            explain(f"{where}: TensorSpec for activations", "symmetric=True when dynamic", "False", "Use -static.")
        )
    learned = False if dynamic else bool(rule.learns_scale if spec.learn_scale is None else spec.learn_scale)
    out = replace(
        spec,
        symmetric=symmetric,
        granularity=granularity,
        dynamic=dynamic,
        observer=spec.observer or "ema",
        learn_scale=learned,
        grid="int" if spec.grid == "auto" else spec.grid,
        range="scale" if spec.range == "auto" else spec.range,
    )
    check_combination(out, rule, False, where)
    return out


def check_combination(spec: TensorSpec, rule: Estimator, is_weight: bool, where: str) -> None:
    """Which grid, range, format and estimator go together.

    * A method that chooses codes itself (rounds at random, by thresholds) needs a uniform grid.
    * A range with two free ends or a clip, and a power-of-two threshold, need a uniform grid; codebooks are
      scaled only, and those of weights have negative levels.
    * A scale format other than ``float`` needs scales: ``range='scale'`` on a fixed zero point.
    * A range other than ``scale`` is static: it cannot be dynamic too.
    * Scales per place of a kernel cut weights across channels, so a method must not keep state per channel.

    Raises:
        ValueError: A pair that makes no sense, with the cure.
    """
    try:
        grid = Grid(spec.bits, bool(spec.symmetric), spec.grid, spec.scale_format, spec.narrow)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    name = type(rule).__name__.lower()
    if spec.grid not in UNIFORM:
        if overrides(rule, "assign", "decode"):
            raise ValueError(
                explain(
                    f"{where}: method {name}",
                    "a uniform grid, since it chooses codes itself",
                    f"grid={spec.grid!r}",
                    "Use grid='int', or a method that rounds to the nearest level, such as ste or pege.",
                )
            )
        if spec.range != "scale":
            raise ValueError(
                explain(
                    f"{where}: grid={spec.grid!r}", "range='scale'", f"range={spec.range!r}", "Levels are only scaled."
                )
            )
        if is_weight and not spec.symmetric:
            cure = "Leave -asym out of the scheme: unsigned levels are for inputs that are never negative."
            raise ValueError(explain(f"{where}: grid={spec.grid!r}", "signed levels", "symmetric=False", cure))
    if spec.granularity == "pixel" and overrides(rule, "state", "view"):
        expected, got = "scales that divide channels, since it keeps state", "granularity='pixel'"
        cure = "Use 'channel', or a method without state of its own, such as syq, lsq or ste."
        raise ValueError(explain(f"{where}: method {name}", expected, got, cure))
    if spec.range != "scale" and spec.dynamic:
        raise ValueError(
            explain(
                f"{where}: range={spec.range!r}",
                "a static range",
                "dynamic=True",
                "Use -static in the scheme, or leave dynamic open.",
            )
        )
    real = spec.scale_format == "float16" and spec.range == "offset"  # a step and a real offset, both rounded
    if spec.scale_format != "float" and not real and (spec.range != "scale" or grid.zero is None):
        raise ValueError(
            explain(
                f"{where}: scale_format={spec.scale_format!r}",
                "a symmetric grid with range='scale'" + " or range='offset'" * (spec.scale_format == "float16"),
                f"symmetric={spec.symmetric}, range={spec.range!r}",
                "Use scale_format='float', or drop -asym and range.",
            )
        )
    build_range(spec.range, f"{where}: TensorSpec.range").check(spec, is_weight, where)
