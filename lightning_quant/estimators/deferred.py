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
        turn: ``FakeQuantizer.turn`` and the optimizer step, for a backward that may move state per element.
    """

    settings: Settings
    shape: torch.Size
    zero: float
    factor: float
    compiled: bool
    inputs: int
    turn: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """How many tensors there are."""
        return 3 + self.inputs

    @property
    def is_straight(self) -> bool:
        """Whether the gradient passes unchanged and nothing is learned, unless the scale is."""
        return not (self.settings.clips or self.settings.rule.needs_bins)

    def quantized(self, x: Tensor, tensors: Tensors, spare: Tensor | None = None) -> Tensor:
        """``x`` on its grid; a graph is kept if gradients are enabled.  ``spare``: see ``base.quantized``."""
        blocks, scale, zero, table, *inputs = self._given(x, tensors)
        if torch.is_grad_enabled():
            grid, clips, interior, training, rule = self.settings
            constants = (table, grid, clips, self.factor, interior, training, rule)
            y = FakeQuantize.apply(blocks, scale, zero, *constants, *inputs)  # type: ignore[no-untyped-call]
        else:
            body: Any = quantized_compiled if self.compiled else quantized
            y = body(self.settings, blocks, scale, zero, table, *inputs, spare=self._blocks(spare))
        return y.reshape(x.shape)  # type: ignore[no-any-return]

    def gradients(self, grad: Tensor, x: Tensor, tensors: Tensors, learns: bool) -> tuple[Tensor, Tensors]:
        """Gradients of ``x`` and of the tensors, given that of the quantized ``x``: see ``base.gradients``."""
        if self.is_straight and not learns:
            return grad, (None,) * len(tensors)
        body = gradients_compiled if self.compiled and not torch.is_grad_enabled() else gradients
        found = body(self.settings, learns, grad.reshape(self.shape), *self._given(x, tensors))
        return found.x.reshape(x.shape), self._found(tensors, found.scale, found.state)

    def gradients_and_quantized(
        self, grad: Tensor, x: Tensor, tensors: Tensors, learns: bool, spare: Tensor | None
    ) -> tuple[Tensor, Tensors, Tensor]:
        """Both at once, without a graph; overwrites ``grad``, which must be contiguous."""
        if self.is_straight and not learns:
            return grad, (None,) * len(tensors), self.quantized(x, tensors, spare)
        body: Any = gradients_compiled if self.compiled else gradients
        given = (grad.view(self.shape), *self._given(x, tensors))
        found = body(self.settings, learns, *given, spare=self._blocks(spare), again=True)
        moved = self._found(tensors, found.scale, found.state)
        return found.x.reshape(x.shape), moved, found.y.reshape(x.shape)

    def _given(self, x: Tensor, tensors: Tensors) -> tuple[Any, ...]:
        scale, zero, *rest = tensors
        return x.reshape(self.shape), scale, self.zero if zero is None else zero, *rest

    def _blocks(self, spare: Tensor | None) -> Tensor | None:
        return None if spare is None else spare.view(self.shape)

    def _found(self, tensors: Tensors, scale: Tensor | None, state: Tensors) -> Tensors:
        like = tensors[0]
        assert like is not None
        return None if scale is None else scale.mul_(self.factor).to(like.dtype), None, None, *state
