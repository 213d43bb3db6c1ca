"""``QuantConfig.setup``: what is done before a run, one step after the other, the same on every rank.

Transforms work on the float model.  Steps that need quantizers come after ``attach``: a choice of all ranges together,
and at the end one rounding, whose integers and scales are those of the first training step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_quant import distributed, zero
from lightning_quant.adapters import acting_beside, lora_layers
from lightning_quant.attach import is_attached, quantizers
from lightning_quant.errors import AttachError, explain, unknown
from lightning_quant.estimators import build_estimator
from lightning_quant.layers import is_compact
from lightning_quant.presets import PRESETS
from lightning_quant.rounding import ROUNDINGS, TUNINGS, round_model
from lightning_quant.rounding.held import check_method
from lightning_quant.rounding.methods import build_rounding
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms import TRANSFORMS
from lightning_quant.transforms.equalize import without_relu6
from lightning_quant.transforms.pairs import Inputs, as_batches
from lightning_quant.transforms.rescale import TransformReport

OWN = ("model", "batches", "config")
WHERE = "QuantConfig.setup"
# In the order they run.
KINDS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("transform", TRANSFORMS),
    ("choice of ranges", TUNINGS),
    ("rounding", ROUNDINGS),
)


def check_setup(config: QuantConfig) -> None:
    """Complain about a step or an option that does not exist or does not fit, before any work.

    Raises:
        ValueError: An unknown name or option, steps in another order than ``KINDS``, more than one rounding, or a
            rounding that the rest of the config has no place for.
    """
    latest, last = 0, ""
    for name, options in _steps(config):
        place = next((i for i, (_, known) in enumerate(KINDS) if name in known), None)
        if place is None:
            raise ValueError(_unknown(name))
        kind, known = KINDS[place]
        where = f"{WHERE}: {name}"
        if place < latest or (place == latest and kind == "rounding"):
            expected = f"a {kind} before any {KINDS[latest][0]}" if place < latest else "one rounding at most"
            cure = "The order is transforms, lapq, one rounding."
            raise ValueError(explain(where, expected, f"it after {last}", cure))
        latest, last = place, name
        if kind == "rounding":
            build_rounding(name, options)
            _check_rounding(config, where)
            continue
        if kind != "transform":
            _refuse_delay(config, where)
        own = [n for n in inspect.signature(known[name]).parameters if n not in OWN]
        for option in options:
            if option not in own:
                raise ValueError(unknown("option", option, own or ["(none)"], where))


def _unknown(name: str) -> str:
    """Message for a name that is no step: all there are, by their kind."""
    kinds = {each: kind for kind, known in KINDS for each in known}
    nearest = unknown("step", name, [*kinds, *PRESETS], WHERE).rpartition("Did you mean step ")[2]
    near = nearest.strip("'?")
    found = "; ".join(f"{', '.join(sorted(known))} ({kind.removesuffix('s')}s)" for kind, known in KINDS)
    cure = f"Did you mean {kinds.get(near, 'preset')} {near!r}?" if near in {*kinds, *PRESETS} else "Use one of those."
    return explain(WHERE, f"one of {found}; {', '.join(PRESETS)} (presets)", repr(name), cure)


def _check_rounding(config: QuantConfig, where: str) -> None:
    """Refuse what would not leave training the codes that were chosen."""
    _refuse_delay(config, where)
    if config.weight is None:
        raise ValueError(explain(where, "weights to round", "weight=None", "Leave it out, or set a scheme."))
    if config.batch_norm != "keep":
        got = f"batch_norm={config.batch_norm!r}, which rounds another weight at every step"
        raise ValueError(explain(where, "a weight that is rounded as it is", got, "Leave one of them out."))
    check_method(build_estimator(config.method, dict(config.options)).role(True), where)


def _refuse_delay(config: QuantConfig, where: str) -> None:
    if config.delay:
        got, cure = f"delay={config.delay:g}", "Leave one of them out; setup='light' has transforms only."
        raise ValueError(explain(where, "training that is quantized from its first step", got, cure))


def sets_ranges(config: QuantConfig) -> bool:
    """Whether set-up chooses the ranges of activations, so that training shall not calibrate them."""
    return any(name in TUNINGS for name, _ in _steps(config))


def rounds(config: QuantConfig) -> bool:
    """Whether set-up leaves weights on their grids."""
    return any(name in ROUNDINGS for name, _ in _steps(config))


def set_up(model: nn.Module, config: QuantConfig, batches: Iterable[Any]) -> TransformReport:
    """Run the transforms of ``config.setup`` on a float model, in place.

    Under a process group all ranks end with the first one's weights.

    Args:
        model: With its weights, before ``attach``, adapters and sharding.
        config: What to run, and the grids that some transforms look ahead to.
        batches: Data, the same on every rank: see ``of_first_rank``.

    Returns:
        What was done, and which steps wait for ``set_up_attached``.

    Raises:
        AttachError: Adapters, packed or sharded weights, or quantizers in place.
        ValueError: No data, or a bad option.
    """
    check_setup(config)
    refuse_unfit(model)
    data, report = _beside(model, batches), TransformReport()
    for name, options in _steps(config):
        if name in TRANSFORMS:
            transform = TRANSFORMS[name]
            grids = {"config": config} if "config" in inspect.signature(transform).parameters else {}
            report.add(transform(model, data, **grids, **options))
        else:
            report.waiting.append(name)
    _agree(model)
    return report


def set_up_attached(model: nn.Module, config: QuantConfig, batches: Iterable[Any], report: TransformReport) -> None:
    """Run the other steps of ``config.setup`` on a model with quantizers, in place.

    Args:
        model: After ``set_up`` and ``attach``, before sharding.
        config: What to run.
        batches: As for ``set_up``.
        report: Takes what was done.

    Raises:
        ValueError: No data, or a layer that cannot be rounded so.
    """
    data = _beside(model, batches)
    for name, options in _steps(config):
        if name in TUNINGS:
            report.chosen.append(TUNINGS[name](model, data, **options))
        elif name in ROUNDINGS:
            report.chosen.append(round_model(model, None, data, name, config.seed, **options))
    report.waiting.clear()
    _agree(model)
    for _, q in quantizers(model):
        q.called = False  # training's own forwards are what coverage asks for


def _agree(model: nn.Module) -> None:
    """Every rank takes the first one's weights and ranges."""
    for tensor in [*model.parameters(), *model.buffers()]:
        distributed.broadcast(tensor.data)


def restructure(model: nn.Module, config: QuantConfig) -> None:
    """What ``set_up`` changes beside weights, for a model whose weights come from a checkpoint of such a run."""
    for name, options in _steps(config):
        if name == "equalize" and options.get("relu6"):
            without_relu6(model)


def refuse_unfit(model: nn.Module) -> None:
    """Complain about a model whose weights are not what it computes with, or not here.

    Raises:
        AttachError: It is one.
    """

    def refuse(where: str, expected: str, got: str, cure: str) -> AttachError:
        return AttachError(explain(f"QuantConfig.setup: {where or type(model).__name__}", expected, got, cure))

    adapters = next((path for path, _ in [*lora_layers(model), *acting_beside(model, set())]), None)
    if adapters is not None or hasattr(model, "peft_config"):
        cure = "Run them by hand before get_peft_model: lightning_quant.transforms.smoothquant(model, batches)."
        raise refuse(adapters or "", "a model without adapters", "one that PEFT wrapped", cure)
    if is_attached(model):
        raise refuse("", "a float model", "one with quantizers", "Call detach(model, fold=False) first.")
    for path, module in model.named_modules():
        if is_compact(module):
            cure = "Load it in float, run the transforms, and save it before packing."
            raise refuse(path, "weights in float", f"a packed {type(module).__name__}", cure)
        for p in module._parameters.values():
            if p is None:
                continue
            if zero.is_partitioned(p) or hasattr(p, "to_local"):
                kind = "ZeRO-3" if zero.is_partitioned(p) else type(p).__name__
                cure = "Run the transforms by hand in one process before sharding, and save the model for the run."
                raise refuse(path, "whole weights on every rank", f"weights sharded by {kind}", cure)
            if p.device.type == "meta":
                raise refuse(path, "weights with values", "the meta device", "Load them before.")


def _steps(config: QuantConfig) -> list[tuple[str, dict[str, Any]]]:
    """Names and options."""
    found = []
    for entry in config.setup:
        given = {"name": entry} if isinstance(entry, str) else dict(entry)
        found.append((str(given.pop("name")), given))
    return found


def of_first_rank(model: nn.Module, batches: Iterable[Any], count: int) -> list[Any]:
    """The first batches, on the model's device; under a process group the first rank's, on all.

    Raises:
        ValueError: There is none.
    """
    taken: list[Any] = []
    if distributed.rank() == 0:
        for batch in batches if not isinstance(batches, (Mapping, torch.Tensor)) else [batches]:
            taken.append(batch)
            if len(taken) == count:
                break
    if distributed.active():
        held = [[_moved(batch, torch.device("cpu")) for batch in taken]]
        dist.broadcast_object_list(held, src=0)
        taken = held[0]
    return _beside(model, taken)


def _beside(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Batches where the model is, which may have moved since they were taken."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [_moved(batch, device) for batch in as_batches(batches)]


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Inputs):
        return replace(batch, args=_moved(batch.args, device), kwargs=_moved(batch.kwargs, device))
    return tree_map_only(torch.Tensor, lambda t: t.to(device), batch)


__all__ = [
    "check_setup",
    "of_first_rank",
    "refuse_unfit",
    "restructure",
    "rounds",
    "set_up",
    "set_up_attached",
    "sets_ranges",
]
