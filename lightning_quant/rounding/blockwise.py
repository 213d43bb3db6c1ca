"""The driver: one block after another, each on what the rounded blocks before it make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import distributed
from lightning_quant.attach import ALIKE, attach, is_attached, quant_layers, quantizers, read_in_float
from lightning_quant.bypass import bypassed, evaluating
from lightning_quant.calibration import commit_ranges
from lightning_quant.errors import explain
from lightning_quant.layers import QuantLayer
from lightning_quant.progress import track
from lightning_quant.rounding.gradients import squared_gradients
from lightning_quant.rounding.held import Held, check
from lightning_quant.rounding.methods import Rounding, build_rounding
from lightning_quant.rounding.report import RoundingReport
from lightning_quant.rounding.unit import Call, Unit, first_tensor, watched
from lightning_quant.rounding.walk import Walk
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.pairs import blocks


class Keeper:
    """Where the weights of a model's parts are; here in memory, all the time.

    Another one may bring them from elsewhere, and store what was rounded.
    """

    def open(self, path: str) -> None:
        """Bring a block's float weights and fit their ranges."""

    def restore(self, path: str) -> bool:
        """Bring a block's rounded weights; False if it has not been rounded yet."""
        return False

    def store(self, path: str) -> None:
        """Take note of a rounded block."""

    def close(self, path: str) -> None:
        """A block is done with."""


def round_model(
    model: nn.Module,
    config: QuantConfig | None,
    batches: Iterable[Any],
    rounding: str = "gptq",
    seed: int = 0,
    **options: Any,
) -> RoundingReport:
    """Choose the codes of a model's weights from data, and write the weights that stand for them.

    Evaluation, an export and a training that starts here then have exactly these codes: weights lie on their grids.
    Static ranges of activations that no data has set yet are calibrated on the way.  What a model's blocks read is in
    memory for all batches at once: batches times tokens times width numbers, twice for roundings that compare with
    the float model.

    Args:
        model: In float, or with quantizers; left in the mode it was in.
        config: What to quantize and how; not looked at if the model has quantizers.
        batches: Each a mapping (keyword arguments), a tuple or list (positional), or one tensor.
        rounding: Name in ``ROUNDINGS``.
        seed: Of what is drawn.
        options: Of the rounding.

    Returns:
        Errors of outputs by layer or block, and what was not rounded by the rule.

    Raises:
        ValueError: Unknown rounding or option, no batches, or layers that cannot be rounded so.
    """
    rule = build_rounding(rounding, options)
    held = list(batches)
    if not held:
        raise ValueError(explain("round_model", "at least one batch", 0, "Pass representative inputs."))
    if not is_attached(model):
        if config is None:
            raise ValueError(explain("round_model", "a config", "a float model without one", "Pass a QuantConfig."))
        attach(model, config)
    report = RoundingReport(rounding)
    check_layers(model, report)
    with evaluating(model):
        paths = units(model)
        weights = squared_gradients(model, paths, held) if rule.needs_gradients else {}
        round_units(model, held, rule, report, seed=seed, paths=paths, weights=weights)
    _agree(model)
    return report


def check_layers(model: nn.Module, report: RoundingReport) -> None:
    """Refuse, before anything is changed, layers that cannot be rounded; note those to be left alone.

    Raises:
        ValueError: See ``held.check``.
    """
    alone = read_in_float(model)
    for path, layer in quant_layers(model):
        if path in alone:
            report.kept[path] = f"{alone[path]} reads the same weight in float. {ALIKE}"
        elif layer.weight_quant.device.type != "meta" and not layer.weight.is_meta:
            check(layer, path)
    if len(report.kept) == sum(1 for _ in quant_layers(model)):
        path, why = next(iter(report.kept.items()))
        raise ValueError(explain(path, "a weight of the layer's own", why, "Nothing is left to round."))


def units(model: nn.Module) -> list[str]:
    """Paths of the parts that are rounded one by one: repeated blocks, or else elements of ``nn.Sequential``.

    Empty for a model of one piece.
    """
    if found := blocks(model):
        return found
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{p}.") for p in found)
        if isinstance(module, nn.Sequential) and not inner:
            own = [name for name, child in module.named_children() if any(True for _ in quant_layers(child))]
            found += [f"{path}.{name}".lstrip(".") for name in own]
    return found


@torch.no_grad()
def round_units(
    model: nn.Module,
    batches: Sequence[Any],
    rule: Rounding,
    report: RoundingReport,
    *,
    seed: int = 0,
    paths: Sequence[str] = (),
    weights: dict[str, list[Tensor]] | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Round every layer of a model, part by part.

    Args:
        model: With quantizers, in evaluation mode.
        batches: Inputs.
        rule: How.
        report: Gets what was done.
        seed: Of what is drawn.
        paths: See ``units``.
        weights: See ``squared_gradients``.
        keeper: Of the parts' weights.
    """
    driver = _Driver(model, list(batches), rule, report, seed, list(paths), weights or {}, keeper or Keeper())
    driver.run()


class _Driver:
    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        rule: Rounding,
        report: RoundingReport,
        seed: int,
        paths: list[str],
        weights: dict[str, list[Tensor]],
        keeper: Keeper,
    ) -> None:
        self.model, self.batches, self.rule, self.report = model, batches, rule, report
        self.seed, self.paths, self.weights, self.keeper = seed, paths, weights, keeper
        inside = tuple(f"{path}." for path in paths)
        own = [(p, layer) for p, layer in quant_layers(model) if p not in report.kept]
        self.outside = {p: layer for p, layer in own if not p.startswith(inside) and p not in paths}
        self.finished: set[str] = set()

    def run(self) -> None:
        """Everything, in order."""
        if not self.paths:
            self._whole()
            return
        with ExitStack() as stack:
            exact = stack.enter_context(Walk(self.model, self.paths, self.batches)) if self.rule.needs_float else None
            place, float_calls = self._first(stack, exact)
            bar = iter(track(range(len(self.paths)), "rounding blocks"))
            while place is not None:
                next(bar, None)
                path, calls = place
                outputs, float_outputs = self._block(path, calls, float_calls)
                place, float_calls = self._next(exact, outputs, float_outputs)
            for _ in bar:  # blocks that no batch reaches
                pass
        self._rest()

    def _whole(self) -> None:
        """Round a model of one piece."""
        calls, targets = [Call.of(batch) for batch in self.batches], None
        if self.rule.needs_float:
            with bypassed(self.model):
                targets = [first_tensor(call.run(self.model)) for call in calls]
        self._round(Unit("", self.model, calls, calls, targets, seed=self.seed))

    def _first(self, stack: ExitStack, exact: Walk | None) -> tuple[tuple[str, list[Call]] | None, list[Call] | None]:
        """Round what runs before the first block, and go there."""
        float_inputs, place = self._advance(exact, None, True)
        float_calls = None if place is None else place[1]
        self.walk = Walk(self.model, self.paths, self.batches)
        with ExitStack() as trial:
            trial.enter_context(self.walk)
            inputs, place = self._advance(self.walk, None, False)
            if place is None or not inputs:
                self._layers(inputs, float_inputs)
                trial.pop_all()
                stack.push(self.walk)
                return place, float_calls
        self._layers(inputs, float_inputs)
        self.walk = stack.enter_context(Walk(self.model, self.paths, self.batches))
        return self._advance(self.walk, None, False)[1], float_calls

    def _next(
        self, exact: Walk | None, outputs: list[Any], float_outputs: list[Any]
    ) -> tuple[tuple[str, list[Call]] | None, list[Call] | None]:
        float_inputs, float_place = self._advance(exact, float_outputs, True)
        inputs, place = self._advance(self.walk, outputs, False)
        self._layers(inputs, float_inputs)
        return place, None if float_place is None else float_place[1]

    def _advance(
        self, walk: Walk | None, outputs: list[Any] | None, in_float: bool
    ) -> tuple[dict[str, list[Call]], tuple[str, list[Call]] | None]:
        """Go on to the next block; the calls that layers between blocks got on the way."""
        found: dict[str, list[Call]] = {}
        if walk is None:
            return found, None
        waiting = {p: m for p, m in self.outside.items() if p not in self.finished}

        def see(path: str, x: Tensor) -> None:
            found.setdefault(path, []).append(Call((x.clone(),)))

        with watched(waiting, see):
            if in_float:
                with bypassed(self.model):
                    return found, walk.advance(outputs)
            return found, walk.advance(outputs)

    def _layers(self, inputs: dict[str, list[Call]], float_inputs: dict[str, list[Call]]) -> None:
        """Round layers between blocks."""
        for path, calls in inputs.items():
            layer, exact = self.outside[path], float_inputs.get(path)
            targets = None
            if self.rule.needs_float:
                with bypassed(layer):
                    targets = [first_tensor(call.run(layer)) for call in exact or calls]
            self._round(Unit(path, layer, calls, exact or calls, targets, seed=self.seed))

    def _block(self, path: str, calls: list[Call], exact: list[Call] | None) -> tuple[list[Any], list[Any]]:
        module, float_outputs = self.model.get_submodule(path), []
        self.keeper.open(path)
        if exact is not None:
            with bypassed(module):
                float_outputs = [call.run(module) for call in exact]
        if not self.keeper.restore(path):
            targets = [first_tensor(y) for y in float_outputs] if exact is not None else None
            weights = self.weights.get(path) or None
            self._round(Unit(path, module, calls, exact, targets, weights, self.seed))
            self.keeper.store(path)
        outputs = [call.run(module) for call in calls]
        self.keeper.close(path)
        return outputs, float_outputs

    def _round(self, unit: Unit) -> None:
        layers = unit.layers()
        kept = {path for path in layers if path in self.report.kept or path in self.finished}
        if kept == layers.keys():
            return
        unit.kept = frozenset(kept)
        _calibrate(unit)
        self.report.errors.update(self.rule(unit))
        self.report.nearest.update(unit.nearest)
        self.finished |= layers.keys()

    def _rest(self) -> None:
        """What no batch reached is rounded to nearest."""
        for path, layer in quant_layers(self.model):
            if path in self.finished or path in self.report.kept or layer.weight.is_meta:
                continue
            held = Held(layer, path)
            held.write(held.nearest(held.rows))
            self.report.nearest[path] = "no calibration input reached it"


def _calibrate(unit: Unit) -> None:
    """Set static ranges of activations in a unit that no data has set."""
    waiting = [q for _, q in quantizers(unit.module) if not (q.is_weight or q.ready or q.observer.data_free)]
    if not waiting:
        return
    try:
        for q in waiting:
            q.observing = True
        for call in unit.calls:
            call.run(unit.module)
            commit_ranges(unit.module)
    finally:
        for q in waiting:
            q.observing = False


def _agree(model: nn.Module) -> None:
    """Every rank of a process group takes the first one's weights and ranges."""
    if not distributed.active():
        return
    for _, layer in quant_layers(model):
        _broadcast(layer)


def _broadcast(layer: QuantLayer) -> None:
    for tensor in (layer.weight, *layer.weight_quant.state_dict().values()):
        torch.distributed.broadcast(tensor.data, 0)
