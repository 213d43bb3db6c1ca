"""The same arithmetic in one pass over memory each way: by kernels of our own, else through PyTorch's compiler.

Every method's formulas are compiled as they stand, for processors and GPUs alike, so there is no second version of
any but what ``kernels`` and ``native`` hold.  A kernel is shared by all layers with the same settings; sizes may differ
but for the innermost, which the granularity fixes.  On CPUs its forward has the bits of the uncompiled one.
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


def quantized_compiled(settings: Settings, x: Tensor, *rest: Any, spare: Tensor | None = None) -> Tensor:
    """``quantized`` in one pass; ``spare``: see there."""
    ours = kernels_for(settings, x, *rest)
    if ours is None:
        return one_pass(quantized, settings, x, *rest)  # type: ignore[no-any-return]
    return ours.quantized(settings, x, *rest, spare=spare)  # type: ignore[no-any-return]


def gradients_compiled(
    settings: Settings, learns: bool, grad: Tensor, *given: Any, spare: Tensor | None = None, again: bool = False
) -> Gradients:
    """``gradients`` in one pass; ``spare`` and ``again``: see there."""
    ours = kernels_for(settings, *given)
    if ours is not None:
        return ours.gradients(settings, learns, grad, *given, spare=spare, again=again)  # type: ignore[no-any-return]
    if not again:
        return one_pass(gradients, settings, learns, grad, *given)  # type: ignore[no-any-return]
    y = torch.empty_like(given[0]) if spare is None else spare
    scale, state = one_pass(_in_place, settings, learns, y, grad, *given)
    return Gradients(grad, scale, state, y)


def kernels_for(settings: Settings, x: Tensor, *rest: Any) -> Any:
    """The module of kernels of our own that fit, or None.  They know the methods, of which some import this file."""
    from lightning_quant.estimators import kernels, native

    return next((ours for ours in (kernels, native) if ours.fits(settings, x, *rest)), None)


def _in_place(settings: Settings, learns: bool, y: Tensor, grad: Tensor, *given: Any) -> tuple[Any, ...]:
    """``gradients`` in place of ``grad``, and the rounded input in place of ``y``."""
    found = gradients(settings, learns, grad, *given, again=True)
    grad.copy_(found.x)
    y.copy_(found.y)  # type: ignore[arg-type]
    return found.scale, found.state
