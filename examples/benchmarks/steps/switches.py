"""Each optimisation of the quantizers, switched off from the outside, to see what it buys.

The product has settings for two of them; the others are replaced, while a context is open, by the plainer code that
they took the place of.  A name that is no longer there is an error, never a switch that does nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_quant import ESTIMATORS, controller, reuse, rounded_product
from lightning_quant.attach import quantizers
from lightning_quant.estimators import Deferred, native
from lightning_quant.quantizer import FakeQuantizer


@dataclass(frozen=True)
class Switch:
    """One optimisation.

    Attributes:
        without: What a step does without it.
        config: Fields of ``QuantConfig`` that switch it off.
        replaced: A context in which it is off.
        change: What is changed in a model with quantizers.
        inputs: It concerns quantized inputs only.
        learning: It concerns methods that learn or schedule something.
        elements: It concerns methods with state per element only.
    """

    without: str
    config: Mapping[str, Any] = field(default_factory=dict)
    replaced: Callable[[], AbstractContextManager[Any]] = nullcontext
    change: Callable[[nn.Module], None] | None = None
    inputs: bool = False
    learning: bool = False
    elements: bool = False


def _fill_each(tensors: list[Tensor], value: float | Tensor) -> None:
    for tensor in tensors:
        tensor.fill_(value)


@torch.no_grad()
def _floor_each(all_quantizers: list[Any]) -> None:
    for q in all_quantizers:
        if isinstance(q._parameters.get("scale"), nn.Parameter) and q.ready:
            q.scale.data.clamp_(min=1e-6)


@contextmanager
def _one_by_one() -> Iterator[None]:
    with patch.object(controller, "_fill", _fill_each), patch.object(controller, "_floor_scales", _floor_each):
        yield


@contextmanager
def _nodes_in_python() -> Iterator[None]:
    with patch.object(native, "rounded_linear", _none), patch.object(native, "rounded_input", _none):
        yield


def _none(*args: Any) -> None:
    return None


@contextmanager
def _no_kernels() -> Iterator[None]:
    with patch.object(native, "is_built", lambda: False), patch.object(native, "_known", {}):
        yield


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _mask_everything(model: nn.Module) -> None:
    """Look for values outside of ranges that cover everything: backward reads its input, so that none is shared."""
    for _, q in quantizers(model):
        q.clips, q.stateless = True, False


def _one_after_the_other(self: Any, grad: Tensor, x: Tensor, tensors: Any, learns: bool, spare: Any) -> Any:
    return *self.gradients(grad, x, tensors, learns), self.quantized(x, tensors, spare)


SWITCHES: dict[str, Switch] = {
    "kernels": Switch("operation by operation, without compiled kernels", {"compile": False}),
    "fusion": Switch(
        "captured by PyTorch's compiler, run operation by operation",
        replaced=lambda: _both(
            _no_kernels(), patch.object(torch, "compile", functools.partial(torch.compile, backend="eager"))
        ),
    ),
    "C++": Switch("kernels of PyTorch's compiler in place of ours", replaced=_no_kernels),
    "node": Switch("a layer's product as a node of autograd in Python", replaced=_nodes_in_python),
    "recompute": Switch("what was rounded is kept for backward", {"recompute": False}),
    "together": Switch(
        "the node in Python, and in it a weight's gradient and its rounding in two loops",
        replaced=lambda: _both(
            _nodes_in_python(), patch.object(Deferred, "gradients_and_quantized", _one_after_the_other)
        ),
    ),
    "scratch": Switch(
        "the node in Python, and in it memory of its own for every rounded weight",
        replaced=lambda: _both(_nodes_in_python(), patch.object(rounded_product, "scratch", lambda like: None)),
    ),
    "sharing": Switch(
        "every layer rounds its own input",
        replaced=lambda: patch.object(reuse, "allowed", lambda x: False),
        inputs=True,
    ),
    "absmax": Switch(
        "largest magnitudes and rounding in passes of their own",
        replaced=lambda: patch.object(native, "reads_rows", lambda grid, x: False),
        inputs=True,
    ),
    "masks": Switch("range masks where nothing lies outside, and so no sharing", change=_mask_everything, inputs=True),
    "prefetch": Switch(
        "memory asked for when it is read, and not before",
        replaced=lambda: patch.object(native, "FLAGS", (*native.FLAGS, "-DLIGHTNING_QUANT_AHEAD=0")),
    ),
    "turn": Switch(
        "Theta per element moved in a pass of its own, behind backward",
        replaced=lambda: patch.object(FakeQuantizer, "track_turn", FakeQuantizer.track_step),
        elements=True,
    ),
    "foreach": Switch("schedules and floors of scales set one by one", replaced=_one_by_one, learning=True),
}


def applying(method: str, scheme: str) -> list[str]:
    """The switches that have something to do under a method and a scheme; of state per element those alone."""
    name, *element = method.split()
    if element:
        return [name for name, s in SWITCHES.items() if s.elements]
    rule = ESTIMATORS[name]()
    learns = rule.learns_scale or bool(rule.schedules())
    given = "a16" not in scheme
    shared = {name: s for name, s in SWITCHES.items() if not s.elements}
    return [name for name, s in shared.items() if (given or not s.inputs) and (learns or not s.learning)]
