"""The share of a training step that is spent in this package's code, from PyTorch's profiler.

Ranges are put around the pieces from outside, so that the product holds none:

* forward: quantizers called in the forward pass;
* backward: their gradients, and quantizers called again because a layer or a checkpoint recomputes;
* controller: what is done once before and after each step;
* optimizer: the update of what quantizers learn (scales, Theta).

Profiling slows short operations down more than long ones, so shares are upper bounds where kernels are not compiled.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

PIECES = ("forward", "backward", "controller", "optimizer")
STEP = "a training step"
Namer = Callable[..., str | None]


class _Ranges:
    """Wraps functions in named ranges; a range inside another one is not counted again."""

    def __init__(self) -> None:
        self.inside = False

    def wrap(self, function: Callable[..., Any], name: Namer) -> Callable[..., Any]:
        """The function in a range whose name depends on its arguments; None: in none."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            piece = None if self.inside else name(*args)
            if piece is None:
                return function(*args, **kwargs)
            self.inside = True
            try:
                with record_function(f"ours {piece}"):
                    return function(*args, **kwargs)
            finally:
                self.inside = False

        return wrapped


def _pass(*args: Any) -> str:
    """Which pass is running: recomputation belongs to the backward one."""
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def _is_method(name: str, part: Any) -> bool:
    return inspect.isfunction(part) and not name.startswith("_")


def _functions() -> Iterator[type[torch.autograd.Function]]:
    """The autograd functions of the estimators."""
    from lightning_quant import estimators

    for info in pkgutil.iter_modules(estimators.__path__, estimators.__name__ + "."):
        for kind in vars(importlib.import_module(info.name)).values():
            if isinstance(kind, type) and issubclass(kind, torch.autograd.Function) and kind.__module__ == info.name:
                yield kind


@contextmanager
def ranges(model: nn.Module) -> Iterator[None]:
    """While open, this package's pieces run in ranges."""
    from lightning_quant.attach import quantizers
    from lightning_quant.controller import QuantController
    from lightning_quant.estimators import Deferred
    from lightning_quant.quantizer import FakeQuantizer

    adam = importlib.import_module("torch.optim.adam")  # the package hides its own module
    around = _Ranges()
    learned = {id(p) for _, q in quantizers(model) for p in q.parameters()}

    def update(params: list[Tensor], *args: Any) -> str | None:
        return "optimizer" if params and id(params[0]) in learned else None

    wanted: list[tuple[Any, str, Namer]] = [(adam, "adam", update)]
    wanted += [(FakeQuantizer, name, _pass) for name in ("forward", "deferred")]
    wanted += [(Deferred, name, _pass) for name, part in vars(Deferred).items() if _is_method(name, part)]
    for name in ("on_step", "before_optimizer_step", "after_optimizer_step"):
        wanted.append((QuantController, name, lambda *args: "controller"))
    with ExitStack() as stack:
        for holder, name, namer in wanted:
            stack.enter_context(patch.object(holder, name, around.wrap(getattr(holder, name), namer)))
        for kind in _functions():
            wrapped = around.wrap(kind.backward, lambda *args: "backward")
            stack.enter_context(patch.object(kind, "backward", staticmethod(wrapped)))
        yield


def shares(model: nn.Module, step: Callable[[], Any], steps: int = 3) -> dict[str, float]:
    """Shares of a step's time by piece: of the processor's thread, on a GPU of the kernels' time.

    Args:
        model: With quantizers.
        step: Takes a training step.
        steps: How many are looked at, after one that is not.
    """
    device = next(model.parameters()).device.type
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with ranges(model):
        step()
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                with record_function(STEP):
                    step()
    clock = "cpu_time_total" if device == "cpu" else "device_time_total"
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        times[event.key] = times.get(event.key, 0.0) + getattr(event, clock)
    # Nodes of autograd in C++ have ranges of their own.
    found = {piece: times.get(f"ours {piece}", 0.0) + times.get(f"lightning_quant::{piece}", 0.0) for piece in PIECES}
    return {piece: round(time / times[STEP], 5) for piece, time in found.items()}
