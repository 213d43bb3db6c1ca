"""A quantization that another operation makes in passing, forward and once more in backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_quant.estimators.base import FakeQuantize, Settings, gradients, quantized
from lightning_quant.estimators.compiled import gradients_compiled, quantized_compiled

Tensors = tuple[Tensor | None, ...]


class Deferred(NamedTuple):
    """``FakeQuantize`` without its tensors, which autograd wants to see one by one.

    They are, in this order, the scale, the zero point (None if it is one number), the codebook (or None) and those
    of the estimator.

    Attributes:
        settings: See ``FakeQuantize``.
        shape: Of the input, viewed as blocks.
        zero: The zero point, if it is one number.
        factor: What the scale's gradient is multiplied with.
        compiled: Through the compiler.
        inputs: How many tensors the estimator has.
    """

    settings: Settings
    shape: torch.Size
    zero: float
    factor: float
    compiled: bool
    inputs: int

    @property
    def size(self) -> int:
        """How many tensors there are."""
        return 3 + self.inputs

    def quantized(self, x: Tensor, tensors: Tensors, spare: Tensor | None = None) -> Tensor:
        """``x`` on its grid; a graph is kept if gradients are enabled.  ``spare``: see ``base.quantized``."""
        scale, zero, *rest = tensors
        zero_point = self.zero if zero is None else zero
        blocks = x.reshape(self.shape)
        if torch.is_grad_enabled():
            table, *inputs = rest
            grid, clips, interior, training, rule = self.settings
            constants = (table, grid, clips, self.factor, interior, training, rule)
            y = FakeQuantize.apply(blocks, scale, zero_point, *constants, *inputs)  # type: ignore[no-untyped-call]
        elif self.compiled:
            y = quantized_compiled(self.settings, blocks, scale, zero_point, *rest)
        else:
            given = None if spare is None else spare.view(self.shape)
            y = quantized(self.settings, blocks, scale, zero_point, *rest, spare=given)  # type: ignore[arg-type]
        return y.reshape(x.shape)  # type: ignore[no-any-return]

    def gradients(
        self, grad: Tensor, x: Tensor, tensors: Tensors, learns: bool, spare: Tensor | None = None
    ) -> tuple[Tensor, Tensors]:
        """Gradients of ``x`` and of the tensors, given that of the quantized ``x``: see ``base.gradients``."""
        if not (self.settings.clips or self.settings.rule.needs_bins or learns):
            return grad, (None,) * len(tensors)
        scale, zero, *rest = tensors
        blocks = grad.reshape(self.shape), x.reshape(self.shape)
        given: tuple[Any, ...] = (self.settings, learns, *blocks, scale, self.zero if zero is None else zero, *rest)
        if torch.is_grad_enabled():
            found = gradients(*given)
        elif self.compiled:
            found = gradients_compiled(*given)
        else:
            found = gradients(*given, spare=None if spare is None else spare.view(self.shape))
        moved = None if found.scale is None else found.scale.mul_(self.factor).to(scale.dtype)  # type: ignore[union-attr]
        return found.x.reshape(x.shape), (moved, None, None, *found.state)
