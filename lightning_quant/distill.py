"""Distillation: a quantized model learns from a float teacher's outputs beside its labels.

    loss + w T^2 KL(softmax(y / T) || softmax(z / T)) + h mean (hidden_z - hidden_y)^2

with outputs z, the teacher's y, a mean over positions.  The teacher is a module of the user's, or the model itself in
evaluation mode with its quantizers bypassed and PEFT's adapters left out: the float base where there are adapters, else
the weights being trained as they are before rounding.  That one costs no memory for weights, and nothing is stored.
Without adapters it is a weak teacher: no loss trains those weights unrounded, and a model that follows them moves them
on.  Where all weights are trained, a float model that stays as it is teaches better (examples/benchmarks/distill.py).

No training loop and no loss function is touched: what a forward returns carries the terms' gradients, which join the
loss's own in its backward pass (``soft_targets``), scaled as the controller's ``on_step`` says.  Losses that loops log
are therefore those of the task alone.

Positions: where ``labels`` come with a forward, those that are not -100, and for models that predict the next token
those before them; else those of an ``attention_mask``; else all.  Classes lie in the last dimension, in maps (four
dimensions or more) in dimension 1, as in ``cross_entropy``.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531 (temperature, T^2); Liu et al. 2023, arXiv:2305.17888 (LLM-QAT:
the float model teaches the quantized one).
**Deviation**: both blend or replace the loss of the labels, here it stays whole.  LLM-QAT's teacher is the model before
training, on text that it wrote itself; the free one here moves with the weights (unless there are adapters) and sees
the batches of the training.  Hidden states are not in either paper.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.bypass import bypassed, evaluating, uncached_autocast
from lightning_quant.errors import CoverageError, explain
from lightning_quant.outputs import describe, hidden_states, places_of, replaced, shares, without_labels
from lightning_quant.parts import find_part
from lightning_quant.soft_targets import AddGradient, soft_target_gradient, square_gradient
from lightning_quant.spec import Distill


class Distiller:
    """The hooks of one run, on the module whose outputs are taught.

    Args:
        spec: Weights, temperature and the module's path.
        teacher: Called with the module's own arguments (without ``labels``); moved to the outputs' device.
            None: the module itself, in float.

    Attributes:
        value: What the last measured call added to the loss, unscaled, 0-dim; None where nothing was measured.
    """

    def __init__(self, spec: Distill, teacher: nn.Module | None = None) -> None:
        self.spec, self.teacher = spec, teacher
        self.value: Tensor | None = None
        self._module: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._scale: float | Tensor = 1.0
        self._measures = self._reached = self._checked = False
        self._seen = "no call of it"
        self._calls = 0
        self._open_calls: list[int] = []

    def find(self, root: nn.Module) -> None:
        """Choose the module.

        Raises:
            AttachError: There is none at ``Distill.module``.
        """
        self.close()
        self._module = find_part(root, self.spec.module, "Distill.module")
        self._checked = self._reached = False

    def open(self, scale: float | Tensor, measure: bool) -> None:
        """Teach in the forwards of training from now on.

        Args:
            scale: What the gradient of the mean loss is multiplied with in this backward.
            measure: Whether ``value`` is wanted.
        """
        self._scale, self._measures, self.value = scale, measure, None
        self._open_calls.clear()
        if not self._handles and self._module is not None:
            # Before hooks that take sharded parameters away, and never inside a compiled graph.
            before, after = (torch.compiler.disable(f) for f in (self._before, self._after))  # type: ignore[no-untyped-call]
            self._handles = [
                self._module.register_forward_pre_hook(before, with_kwargs=True),
                self._module.register_forward_hook(after, with_kwargs=True, prepend=True),
            ]

    def close(self) -> None:
        """Teach no more: the module is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.value = [], None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While open, forwards are the task's alone."""
        was, self._handles = self._handles, []
        try:
            for handle in was:
                handle.remove()
            yield
        finally:
            if was:
                self.open(self._scale, self._measures)

    def check(self, mode: str) -> None:
        """After the first optimizer step: complain if the loss did not come from what was taught.

        Args:
            mode: ``error``, ``warn`` or ``off``.

        Raises:
            CoverageError: It did not, and ``mode`` is ``error``.
        """
        if self._checked or not self._handles or self._module is None:
            return
        self._checked = True
        if self._reached or mode == "off":
            return
        children = [name for name, child in self._module.named_children() if any(True for _ in child.parameters())]
        expected = f"the loss to come from the outputs of {type(self._module).__name__}"
        cure = f"Name the module whose outputs are logits, e.g. distill={{'module': {(children or ['model'])[0]!r}}}."
        message = explain("Distill.module", expected, self._seen, cure)
        if mode == "error":
            raise CoverageError(message)
        warnings.warn(message, stacklevel=2)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Ask for hidden states where they are wanted."""
        self._open_calls.append(self._calls)
        if not self.spec.hidden or not self._teaches(module) or "output_hidden_states" in kwargs:
            return None
        return args, {**kwargs, "output_hidden_states": True}

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The output, with the terms' gradients waiting in it."""
        before = self._open_calls.pop() if self._open_calls else self._calls
        if not self._teaches(module) or before != self._calls:  # wrappers call a module around a call of it
            return None
        places = places_of(output)
        if places is None:
            self._seen = f"{describe(output)}, in which there are no logits"
            return None
        logits: Tensor = output if places[0] is None else output[places[0]]
        self._seen = "outputs that it does not depend on"
        if not (logits.requires_grad and logits.numel()):
            return None
        self._calls += 1
        with torch.no_grad():
            hidden = hidden_states(output) if self.spec.hidden else []
            taught = self._teach(module, args, kwargs, logits.device)
            extras, self.value = self._terms(module, kwargs, logits, hidden, taught)
        through = [logits, *([] if places[1] is None else [output[places[1]]])]
        added = [extras[0], *(None for _ in through[1:]), *extras[1:]]
        joined = AddGradient.apply(added, self._note, *through, *hidden)  # type: ignore[no-untyped-call]
        return replaced(output, places, joined)

    def _teaches(self, module: nn.Module) -> bool:
        return module.training and torch.is_grad_enabled()

    def _note(self) -> None:
        self._reached = True

    def _teach(self, module: nn.Module, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
        """The teacher's output."""
        teacher = module if self.teacher is None else self.teacher
        kwargs = without_labels(teacher, kwargs)
        first = next(teacher.parameters(), None)
        if first is not None and first.device != device and not hasattr(teacher, "hf_device_map"):
            teacher.to(device)
        with torch.no_grad(), evaluating(teacher), uncached_autocast():
            if self.teacher is not None:
                return self.teacher(*args, **kwargs)
            with bypassed(module, adapters=True):
                return module.forward(*args, **kwargs)

    def _terms(
        self, module: nn.Module, kwargs: Mapping[str, Any], logits: Tensor, hidden: list[Tensor], taught: Any
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gradients of the logits and of hidden states, and what the terms add to the loss."""
        extras: list[Tensor | None] = []
        values: list[Tensor | None] = []
        z = logits.movedim(1, -1) if logits.ndim > 3 else logits
        share = shares(module, kwargs, z)
        if self.spec.weight:
            y = _given(taught, logits).to(z.device)
            y = y.movedim(1, -1) if logits.ndim > 3 else y
            rows = share.flatten() * self.spec.weight
            settings = (rows, self.spec.temperature, self._scale, self._measures)
            extra, value = soft_target_gradient(z.flatten(0, -2), y.flatten(0, -2), *settings)
            extra = extra.reshape(z.shape)
            extras.append(extra.movedim(-1, 1) if logits.ndim > 3 else extra)
            values.append(value)
        else:
            extras.append(None)
        theirs = hidden_states(taught) if hidden else []
        if [h.shape for h in theirs] != [h.shape for h in hidden]:
            expected = f"hidden states of shapes {_shapes(hidden)}, as the model's"
            raise ValueError(explain("distillation's teacher", expected, _shapes(theirs), "Leave out hidden."))
        for own, other in zip(hidden, theirs, strict=True):
            counts = share if own.shape[:-1] == share.shape else torch.ones_like(own[..., 0], dtype=share.dtype)
            rows = counts.flatten() * (self.spec.hidden / len(hidden) / counts.sum().clamp(min=1e-30))
            flat = own.flatten(0, -2), other.to(own.device).flatten(0, -2)
            extra, value = square_gradient(*flat, rows, self._scale, self._measures)
            extras.append(extra.reshape(own.shape) if own.requires_grad else None)
            values.append(value)
        return extras, sum(v for v in values if v is not None) if self._measures else None  # type: ignore[return-value]


def _given(taught: Any, logits: Tensor) -> Tensor:
    """The teacher's logits."""
    places = places_of(taught)
    given: Any = taught if places is None or places[0] is None else taught[places[0]]
    if places is None or given.shape != logits.shape:
        expected = f"logits of shape {tuple(logits.shape)}, as the model's"
        cure = "Use a teacher for the same task and vocabulary."
        raise ValueError(explain("distillation's teacher", expected, describe(given), cure))
    return given  # type: ignore[no-any-return]


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)
