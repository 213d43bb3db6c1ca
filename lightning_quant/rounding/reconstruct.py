"""Choose a unit's codes so that its outputs are those of the float model: what AdaRound and its kin have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.progress import track
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.rounding.held import Held
from lightning_quant.rounding.unit import Call, Unit, first_tensor
from lightning_quant.rounding.variables import SoftRounding, Variable, annealed


@dataclass(frozen=True)
class Reconstruct:
    """Gradient descent on rounding variables.

        L = N mean(||y_hat - y||^2) / mean(||y_nearest - y||^2)  +  regularizer * sum(1 - |2 h - 1|^beta)

    with N the number of weights: relative to the error of rounding to nearest, so that one setting serves layers of
    any scale at any width.

    Class attributes: ``variable``, what is optimized; ``decays``, whether
    the learning rate falls linearly to 0; the others as in ``Rtn``.

    Args:
        iterations: Steps of Adam, each on one call.
        lr: Its learning rate.
        regularizer: What the rounding penalty is multiplied with, once 20 % of the steps are over.
    """

    needs_float: ClassVar[bool] = True
    variable: ClassVar[type[Variable]] = SoftRounding
    decays: ClassVar[bool] = False

    iterations: int = 500
    lr: float = 0.1
    regularizer: float = 10.0

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.lr <= 0 or self.regularizer < 0:
            got = f"iterations={self.iterations}, lr={self.lr}, regularizer={self.regularizer}"
            expected = "iterations >= 1, lr > 0 and regularizer >= 0"
            raise ValueError(explain(type(self).__name__.lower(), expected, got, "Leave them out."))

    @property
    def needs_gradients(self) -> bool:
        """Whether the loss's gradients at outputs of blocks are asked for."""
        return False

    def optimize(
        self,
        unit: Unit,
        layers: Mapping[str, QuantLayer],
        targets: Sequence[Tensor],
        drop: float = 0.0,
    ) -> tuple[float, float]:
        """Choose the codes of these layers together and write them.

        Args:
            unit: Their unit, with calls.
            layers: Those to round.
            targets: What the unit's output shall be, one per call.
            drop: Share of the numbers that are as in the float model: inputs of the unit, and of its layers before
                they are quantized.

        Returns:
            Relative squared error of the output with nearest codes, and with the chosen ones: the nearest themselves
            where none better were found.
        """
        draw, module = unit.generator(), unit.module
        weights: list[Tensor | None] = [*unit.weights] if unit.weights else [None] * len(targets)
        sums = [float(_energy(t, w)) for t, w in zip(targets, weights, strict=True)]
        energy = max(sum(sums) / len(sums), 1e-30)
        before = self._error(unit, targets, energy)
        scale = max(before * energy, 1e-30)
        variables = {path: self.variable(Held(layer, path)) for path, layer in layers.items()}
        trained = [variable.v for variable in variables.values()]
        optimizer = torch.optim.Adam(trained, self.lr)
        size = sum(v.held.rows.numel() for v in variables.values())
        what = f"rounding {unit.path or type(module).__name__}"
        dropping = _dropping(module, drop, draw) if drop else nullcontext()
        with torch.enable_grad(), _in_place(layers, variables), dropping:
            for step in track(range(self.iterations), what):
                number = int(torch.randint(len(targets), (1,), generator=draw))
                call = unit.calls[number]
                if drop and unit.float_calls is not None:
                    call = _mixed(call, unit.float_calls[number], drop, draw)
                y = first_tensor(call.run(module))
                loss = _energy(y.float() - targets[number].float(), weights[number]) / scale * size
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * (1 - step / self.iterations if self.decays else 1.0)
                gradients = torch.autograd.grad(loss, trained)
                for variable, gradient in zip(variables.values(), gradients, strict=True):
                    variable.v.grad = gradient
                    pull = variable.pull(annealed(step, self.iterations)) if step >= 0.2 * self.iterations else None
                    if pull is not None:
                        gradient.add_(pull, alpha=self.regularizer)
                optimizer.step()
        for variable in variables.values():
            variable.held.write(variable.codes())
        after = self._error(unit, targets, energy)
        if after > before:  # too few steps for so little data
            for variable in variables.values():
                variable.held.write(variable.held.nearest(variable.held.rows))
            after = before
        return before, after

    @torch.no_grad()
    def _error(self, unit: Unit, targets: Sequence[Tensor], energy: float) -> float:
        weights: list[Tensor | None] = [*unit.weights] if unit.weights else [None] * len(targets)
        found = [
            float(_energy(first_tensor(call.run(unit.module)).float() - y.float(), w))
            for call, y, w in zip(unit.calls, targets, weights, strict=True)
        ]
        return sum(found) / len(found) / energy


def _energy(y: Tensor, weight: Tensor | None) -> Tensor:
    square = y.float().square()
    return square.mean() if weight is None else (square * weight).mean()


@contextmanager
def _in_place(layers: Mapping[str, QuantLayer], variables: Mapping[str, Variable]) -> Iterator[None]:
    """While open, the layers compute with the variables."""
    kept = {path: layer.weight_quant for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer._modules["weight_quant"] = variables[path]
        yield
    finally:
        for path, layer in layers.items():
            layer._modules["weight_quant"] = kept[path]


@contextmanager
def _dropping(module: nn.Module, share: float, draw: torch.Generator) -> Iterator[None]:
    """While open, quantizers of activations leave a share of the numbers as they are."""

    def hook(q: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return _mix(y, args[0], share, draw)

    found = [m for m in module.modules() if isinstance(m, FakeQuantizer) and not m.is_weight]
    handles = [q.register_forward_hook(hook) for q in found]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mixed(call: Call, other: Call, share: float, draw: torch.Generator) -> Call:
    def pick(a: object, b: object) -> object:
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point() and a.shape == b.shape:
            return a if a is b or torch.equal(a, b) else _mix(a, b, share, draw)
        return a

    args, kwargs = tree_map(pick, (call.args, call.kwargs), (other.args, other.kwargs))
    return Call(args, kwargs, call.path)


def _mix(y: Tensor, x: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """``y`` with a share of its numbers taken from ``x``."""
    taken = torch.rand(y.shape, generator=draw).to(y.device) < share
    return torch.where(taken, x, y)
