"""Layers that a runtime fuses into one (query, key and value; gate and up) read one input, and keep one range for it.

Ranges that follow the data are equal by themselves.  Learned ones would part, and the runtime would take the largest
for all: here they are averaged after each optimizer step, which is what one shared range would have learned.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from lightning_quant.attach import quantizers
from lightning_quant.distributed import to_local
from lightning_quant.layers import QuantLayer
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.targets import TARGETS


def fused_layers(model: nn.Module, target: str) -> list[dict[str, nn.Module]]:
    """Linear layers, by path, that a runtime makes one of; groups of two or more.

    Args:
        model: The model; its layers may be quantized or not.
        target: The runtime.
    """
    groups: dict[tuple[str, int], dict[str, nn.Module]] = defaultdict(dict)
    for path, module in model.named_modules():
        parent, _, name = path.removesuffix(".base_layer").rpartition(".")
        for i, names in enumerate(TARGETS[target].fused):
            if name in names and isinstance(module, nn.Linear):
                groups[parent, i][path] = module
    return [group for group in groups.values() if len(group) > 1]


def shared_inputs(model: nn.Module) -> list[list[FakeQuantizer]]:
    """Quantizers with learned ranges of one input, where the runtime that training follows has one range for it."""
    found = []
    targets = {q.target for _, q in quantizers(model)}
    for group in (g for target in targets for g in fused_layers(model, target)):
        inputs = [m.input_quant for m in group.values() if isinstance(m, QuantLayer)]
        learned = [q for q in inputs if q is not None and q.range_parameters()]
        if len(learned) == len(group) and all(q.spec == learned[0].spec for q in learned):
            found.append(learned)
    return found


@torch.no_grad()
def average(groups: list[list[FakeQuantizer]]) -> None:
    """Give every quantizer of a group the group's mean range."""
    for group in groups:
        for same in zip(*(q.range_parameters() for q in group), strict=True):
            values = [to_local(p.data) for p in same]
            mean = torch.stack(values).mean(dim=0)
            for value in values:
                value.copy_(mean)
