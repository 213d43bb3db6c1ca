"""``QuantConfig.setup``: the transforms of a run, one after the other, the same on every rank."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from lightning_quant import distributed, zero
from lightning_quant.adapters import acting_beside, lora_layers
from lightning_quant.attach import is_attached
from lightning_quant.errors import AttachError, explain, unknown
from lightning_quant.layers import is_compact
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms import TRANSFORMS
from lightning_quant.transforms.equalize import without_relu6
from lightning_quant.transforms.pairs import as_batches
from lightning_quant.transforms.rescale import TransformReport

OWN = ("model", "batches", "config")


def check_setup(config: QuantConfig) -> None:
    """Complain about a transform or an option that does not exist, before any work.

    Raises:
        ValueError: There is one.
    """
    for name, options in _steps(config):
        if name not in TRANSFORMS:
            raise ValueError(unknown("transform", name, TRANSFORMS, "QuantConfig.setup"))
        known = [n for n in inspect.signature(TRANSFORMS[name]).parameters if n not in OWN]
        for option in options:
            if option not in known:
                where = f"QuantConfig.setup: {name}"
                raise ValueError(unknown("option", option, known or ["(none)"], where))


def set_up(model: nn.Module, config: QuantConfig, batches: Iterable[Any]) -> TransformReport:
    """Run ``config.setup`` on a float model, in place.

    Under a process group the first rank's batches serve all ranks, and all end with the first rank's weights.

    Args:
        model: With its weights, before ``attach``, adapters and sharding.
        config: What to run, and the grids that some transforms look ahead to.
        batches: Data; ``config.setup_batches`` of them are used.

    Raises:
        AttachError: Adapters, packed or sharded weights, or quantizers in place.
        ValueError: No data, or a bad option.
    """
    check_setup(config)
    refuse_unfit(model)
    data = _of_first_rank(model, batches, config.setup_batches)
    report = TransformReport()
    for name, options in _steps(config):
        transform = TRANSFORMS[name]
        grids = {"config": config} if "config" in inspect.signature(transform).parameters else {}
        report.add(transform(model, data, **grids, **options))
    for tensor in [*model.parameters(), *model.buffers()]:
        distributed.broadcast(tensor.data)
    return report


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


def _of_first_rank(model: nn.Module, batches: Iterable[Any], count: int) -> list[Any]:
    """The first batches, on the model's device; the first rank's on all."""
    taken: list[Any] = []
    if distributed.rank() == 0:
        for batch in batches if not isinstance(batches, (Mapping, torch.Tensor)) else [batches]:
            taken.append(batch)
            if len(taken) == count:
                break
    if distributed.active():
        taken = tree_map_only(torch.Tensor, lambda t: t.cpu(), taken)
        held = [taken]
        dist.broadcast_object_list(held, src=0)
        taken = held[0]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return as_batches(tree_map_only(torch.Tensor, lambda t: t.to(device), taken))


__all__ = ["check_setup", "refuse_unfit", "restructure", "set_up"]
