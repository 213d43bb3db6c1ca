"""SpinQuant: rotations that are learned, so that the rotated model loses least by being quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from lightning_quant import distributed
from lightning_quant.bypass import evaluating
from lightning_quant.errors import explain
from lightning_quant.outputs import places_of
from lightning_quant.progress import track
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.cayley import cayley_step
from lightning_quant.transforms.grids import LayerGrid, layer_grids
from lightning_quant.transforms.pairs import as_batches, find_pairs, whole
from lightning_quant.transforms.precision import computed_in_float32
from lightning_quant.transforms.rescale import TOLERANCE, Applied, TransformReport
from lightning_quant.transforms.rotate import first_rotation
from lightning_quant.transforms.rotation import Rotation, fuse, turn_inputs, turn_outputs

CHECKS = 10  # of the loss over all batches


@computed_in_float32
def spinquant(
    model: nn.Module,
    batches: Iterable[Any],
    config: QuantConfig,
    steps: int = 100,
    lr: float = 1.5,
    seed: int = 0,
    heads: bool = True,
    tolerance: float = TOLERANCE,
) -> TransformReport:
    """Rotate the residual stream, and each head's values, with matrices learned for the quantized model, in place.

    Rotations start as those of ``rotate`` and go down the gradient of the quantized model's loss on the batches, one
    batch a step, with a rate that falls to 0 along a cosine.  The loss is the one the model returns (transformers'
    with labels in the batch), else the squared distance of its output from the float model's.  Weights and inputs of
    layers are rounded as ``config`` says, the rotation fused in; gradients pass rounding unchanged.  Then they are
    fused as ``rotate`` does it, and the output proved to stay.  The loss over all batches is looked at ten times, and
    what has the least is kept, the random rotations if they do; the report has their loss and the least.

    A step takes the time and memory of training, and a rotated and a rounded copy of the weights.

    Args:
        model: In float, before ``attach``; what ``rotate`` can rotate.
        batches: Calibration data.
        config: Whose grids weights and inputs are put on.
        steps: How many.
        lr: The first learning rate; a step is shorter where the gradient is steep, see ``cayley_step``.
        seed: Of the first rotations.
        heads: Rotate values within heads as well, in every layer with a matrix of its own.
        tolerance: As of ``rotate``.

    Raises:
        ValueError: No batch, no step, or no rate above 0.

    Source: Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", ICLR 2025, arXiv:2405.16406 (R1 and R2;
    100 steps of rate 1.5).
    Deviation: the best rotations of ten are kept, theirs are the last.  R3 (queries and keys) and R4 (before the down
    projection) are left out: they would have to be computed in every forward, which runtimes would need kernels for and
    no exported format describes.  What is clipped has the gradient of what is not, and keys, values and
    fused experts are not rounded while rotations are learned.
    """
    if steps < 1 or not lr > 0:
        got = f"steps={steps}, lr={lr}"
        raise ValueError(explain("spinquant", "at least one step, and a rate above 0", got, "Use 100 and 1.5."))
    data = as_batches(batches)
    kept = [(p, p.detach().clone()) for p in model.parameters()]

    def first(name: str, size: int) -> Tensor:
        return first_rotation(name, size, seed)

    pairs = find_pairs(model, data[0]).found
    report, rotations = fuse(model, pairs, data, first, heads, tolerance, "spinquant")
    if not rotations:
        return report
    try:
        learned, losses = _Quantized(model, rotations, layer_grids(model, config), data).learn(steps, lr)
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

    def final(name: str, size: int) -> Tensor:
        return first(name, size) @ learned[name].cpu() if name in learned else first(name, size)

    report, _ = fuse(model, pairs, data, final, heads, tolerance, "spinquant")
    what = f"spinquant (calibration loss {losses[0]:.4g} by random rotations, {losses[1]:.4g} by learned ones)"
    report.applied = [Applied(a.producer, a.consumers, what, a.difference) for a in report.applied]
    return report


class _Quantized:
    """A float model as it will be quantized, a function of further rotations; the model is left as it is.

    Args:
        model: With rotations fused.
        rotations: What is turned further.
        grids: Of the layers.
        data: Calibration batches.
    """

    def __init__(
        self, model: nn.Module, rotations: list[Rotation], grids: Mapping[str, LayerGrid], data: list[Any]
    ) -> None:
        self.model, self.rotations, self.grids, self.data = model, rotations, grids, data
        device = next(model.parameters()).device
        self.turns = {r.name: torch.eye(r.size, dtype=torch.float64, device=device) for r in rotations}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad(), evaluating(model):
            self.wanted = [None if _loss_of(y := self._plain(b)) is not None else _main_tensor(y) for b in data]

    def learn(self, steps: int, lr: float) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """Further rotations by name, and the loss over all batches without and with them; the same on every rank."""
        turns = best = self.turns
        with evaluating(self.model), self._inputs_rounded():
            before = least = self._mean(turns)
            for step in track(range(steps), "learning rotations"):
                gradients = self._gradients(turns, step % len(self.data))
                rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
                turns = {name: cayley_step(q, gradients[name], rate) for name, q in turns.items()}
                if (step + 1) % max(steps // CHECKS, 1) == 0 and (now := self._mean(turns)) < least:
                    best, least = turns, now
        for q in best.values():
            distributed.broadcast(q)
        return best, (before, least)

    def _gradients(self, turns: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        leaves = {name: q.clone().requires_grad_() for name, q in turns.items()}
        with torch.enable_grad():
            loss = self._loss(leaves, batch)
        if not bool(loss.isfinite()):
            got, cure = f"{float(loss.detach())} on batch {batch}", "Use rotate, or look at the batch."
            raise ValueError(explain("spinquant", "a finite loss of the quantized model", got, cure))
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    @torch.no_grad()
    def _mean(self, turns: Mapping[str, Tensor]) -> float:
        return sum(float(self._loss(turns, i)) for i in range(len(self.data))) / len(self.data)

    def _loss(self, turns: Mapping[str, Tensor], batch: int) -> Tensor:
        path, part = whole(self.model, self.data[batch])
        head = f"{path}." if path else ""
        weights = {n.removeprefix(head): w for n, w in self._weights(turns).items() if n.startswith(head)}
        y = functional_call(part.module, weights, part.args, part.kwargs, tie_weights=False)
        want = self.wanted[batch]
        if want is None:
            loss = _loss_of(y)
            assert loss is not None
            return loss
        return (_main_tensor(y) - want).square().sum() / want.square().sum()

    def _weights(self, turns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters by path, turned and rounded; those that modules share turn together, and are rounded apart."""
        found = {id(p): p.detach() for p in self.parameters.values()}
        for rotation in self.rotations:
            for turn, paths, kinds in (
                (turn_inputs, rotation.inputs, ("weight",)),
                (turn_outputs, rotation.outputs, ("weight", "bias")),
            ):
                for parameter in (self.parameters.get(f"{path}.{kind}") for path in paths for kind in kinds):
                    if parameter is not None:
                        own = found[id(parameter)]
                        found[id(parameter)] = turn(own, turns[rotation.name].to(own))
        weights = {name: found[id(p)] for name, p in self.parameters.items()}
        for path, grid in self.grids.items():
            if (name := f"{path}.weight") in weights:
                weights[name] = _straight_through(weights[name], grid.weight)
        return weights

    @contextmanager
    def _inputs_rounded(self) -> Iterator[None]:
        """While open, layers round what they read."""
        layers = [(self.model.get_submodule(p), g) for p, g in self.grids.items() if g.plan.activation is not None]
        handles = [layer.register_forward_pre_hook(_Rounded(grid)) for layer, grid in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _plain(self, batch: Any) -> Any:
        part = whole(self.model, batch)[1]
        return part.module(*part.args, **part.kwargs)


class _Rounded:
    """A hook that rounds a layer's input."""

    def __init__(self, grid: LayerGrid) -> None:
        self.grid = grid

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_straight_through(args[0], self.grid.input), *args[1:])


def _straight_through(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The rounded value, with the gradient of x."""
    return x + (rounded(x.detach()) - x.detach())


def _loss_of(output: Any) -> Tensor | None:
    """The loss a model returned, if it did."""
    places = places_of(output)
    if places is None or places[1] is None:
        return None
    loss: Tensor = output[places[1]]
    return loss


def _main_tensor(output: Any) -> Tensor:
    """What the distance from the float model is taken of: logits, or else the first tensor there is."""
    places = places_of(output)
    if places is None:
        return next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
    main: Tensor = output if places[0] is None else output[places[0]]
    return main


__all__ = ["spinquant"]
