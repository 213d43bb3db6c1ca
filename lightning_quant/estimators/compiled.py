"""The same arithmetic in one pass over memory each way: ``quantized`` and ``gradients`` through PyTorch's compiler.

Every method's formulas are compiled as they stand, for processors and GPUs alike, so there is no second version of
any but the ``kernels`` for CUDA.  A kernel is shared by all layers with the same settings; sizes may differ but for
the innermost, which the granularity fixes.  On CPUs its forward has the bits of the uncompiled one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_quant.estimators.base import Gradients, Settings, begin, finish, gradients, quantized

_kernels: dict[Hashable, tuple[Settings, Callable[..., Any]]] = {}


class CompiledFakeQuantize(torch.autograd.Function):
    """``FakeQuantize`` in compiled passes; for use outside a model that is compiled as a whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        """See ``FakeQuantize.forward``."""
        return begin(ctx, quantized_compiled, x, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """See ``FakeQuantize.backward``."""
        return finish(ctx, gradients_compiled, grad)


def one_pass(body: Callable[..., Any], settings: Settings, *given: Any) -> Any:
    """``body(settings, *given)``, compiled.

    What differs in more than sizes gets a compiled function of its own, since the compiler keeps a short list per
    function and gives up beyond it.

    Args:
        body: Arithmetic on tensors.
        settings: Constants.
        given: Tensors, and further constants.
    """
    rule = settings.rule  # methods' options may not be hashable; the entry keeps the object, so its id stays its own
    kinds = tuple((t.ndim, t.shape[-1:], t.dtype, t.device) if isinstance(t, Tensor) else t for t in given)
    key = (body, settings[:-1], id(rule), kinds)
    if key not in _kernels:

        def fixed(*given: Any) -> Any:
            return body(settings, *given)

        twin = types.FunctionType(fixed.__code__.replace(), fixed.__globals__, body.__name__, None, fixed.__closure__)
        _kernels[key] = settings, torch.compile(twin)
    # The compiler would look at a tensor's history.
    return _kernels[key][1](*(t.detach() if isinstance(t, Tensor) else t for t in given))


def has_kernels(settings: Settings, x: Tensor, *rest: Any) -> bool:
    """Whether Triton's kernels do this quantizer's work."""
    return bool(kernels().fits(settings, x, *rest))


def kernels() -> Any:
    """The module of that name, which knows the methods, of which some import this file."""
    from lightning_quant.estimators import kernels

    return kernels


def quantized_compiled(settings: Settings, x: Tensor, *rest: Any) -> Tensor:
    """``quantized`` in one pass, by Triton's kernel where it fits."""
    fits = has_kernels(settings, x, *rest)
    y: Tensor = kernels().quantized(settings, x, *rest) if fits else one_pass(quantized, settings, x, *rest)
    return y


def gradients_compiled(settings: Settings, learns: bool, *given: Any) -> Gradients:
    """``gradients`` in one pass, by Triton's kernel where it fits."""
    fits = has_kernels(settings, *given[1:])
    body = kernels().gradients if fits else partial(one_pass, gradients)
    found: Gradients = body(settings, learns, *given)
    return found
