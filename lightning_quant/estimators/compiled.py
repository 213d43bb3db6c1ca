"""The same arithmetic in one pass over memory each way: ``quantized`` and ``gradients`` through PyTorch's compiler.

Every method's formulas are compiled as they stand, for processors and GPUs alike, so there is no second version of
any.  A kernel is shared by all layers with the same settings; sizes may differ but for the innermost, which the
granularity fixes.  On CPUs its forward has the bits of the uncompiled one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
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


def quantized_compiled(settings: Settings, x: Tensor, *rest: Any) -> Tensor:
    """``quantized`` in one pass."""
    y: Tensor = _kernel(quantized, settings, x, rest)(*_detached(x, *rest))
    return y


def gradients_compiled(settings: Settings, learns: bool, grad: Tensor, x: Tensor, *rest: Any) -> Gradients:
    """``gradients`` in one pass."""
    found: Gradients = _kernel(gradients, settings, x, rest, learns)(*_detached(grad, x, *rest))
    return found


def _detached(*values: Any) -> list[Any]:
    """Tensors without history, which the compiler would look at."""
    return [v.detach() if isinstance(v, Tensor) else v for v in values]


def _kernel(body: Callable[..., Any], settings: Settings, x: Tensor, rest: tuple[Any, ...], *more: Any) -> Any:
    """The compiled body.

    What differs in more than sizes gets a compiled function of its own, since the compiler keeps a short list per
    function and gives up beyond it.
    """
    rule = settings.rule  # methods' options may not be hashable; the entry keeps the object, so its id stays its own
    shapes = tuple((t.ndim, t.dtype) if isinstance(t, Tensor) else t for t in rest)
    key = (body, more, settings[:-1], id(rule), x.ndim, x.shape[-1:], x.dtype, x.device, shapes)
    if key not in _kernels:

        def fixed(*tensors: Any) -> Any:
            return body(settings, *more, *tensors)

        twin = types.FunctionType(fixed.__code__.replace(), fixed.__globals__, body.__name__, None, fixed.__closure__)
        _kernels[key] = settings, torch.compile(twin)
    return _kernels[key][1]
