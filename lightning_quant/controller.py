"""QuantController: drives quantizers through a training run.  Knows no framework.

Everything it does is a function of the optimizer step, so resuming needs the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_quant import zero
from lightning_quant.attach import attach, check_coverage, is_attached, quant_layers, quantizers
from lightning_quant.bypass import evaluating
from lightning_quant.calibration import commit_ranges, fit_weights, open_observers
from lightning_quant.curvature import curvature
from lightning_quant.distill import Distiller
from lightning_quant.errors import AttachError, explain
from lightning_quant.estimators import build_estimator
from lightning_quant.fused import average, shared_inputs
from lightning_quant.layers import QuantLayer
from lightning_quant.metrics import codes, flips, learned_scales, readings, summary, to_floats
from lightning_quant.norms import hold_statistics
from lightning_quant.optim import freeze_with_weights, split_groups
from lightning_quant.packed import CompactLinear
from lightning_quant.parts import refuse_late_adapters, refuse_other_config
from lightning_quant.quantizer import ACCUMULATES, ALONE, FakeQuantizer
from lightning_quant.report import Report
from lightning_quant.schedule import Schedule, delay_steps
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms import TransformReport
from lightning_quant.transforms.setup import (
    check_setup,
    of_first_rank,
    refuse_unfit,
    restructure,
    rounds,
    set_up,
    set_up_attached,
    sets_ranges,
)

STATE_VERSION = 1
LEFT = "left to the run whose checkpoint is loaded"
LOADED = "that of the checkpoint that was loaded"
SAME = ("method", "weight", "activation", "rules", "options", "batch_norm", "operators", "first_last", "setup")


class QuantController:
    """One training run's quantization: attach, schedules, observers, coverage, metrics.

    The front end calls, in this order: ``prepare`` before the optimizer exists, ``begin`` once the run's
    length is known, ``on_step`` before each forward of training (and ``update_curvature`` after it where
    ``wants_curvature``), ``before_optimizer_step`` and ``after_optimizer_step`` around each update, ``on_eval``
    before evaluation, ``after_eval_batch`` in it.

    Args:
        config: What to quantize and how; checked here, before any work.
        teacher: What ``QuantConfig.distill`` learns from; None: the model itself in float.

    Raises:
        ValueError: A bad setting, or a teacher that nothing learns from.

    Attributes:
        start: First optimizer step whose forwards are quantized (``QuantConfig.delay``), once ``begin`` has run.
        starting: Whether the last ``on_step`` was the first of that very step: training leaves float now.
    """

    def __init__(self, config: QuantConfig, teacher: nn.Module | None = None) -> None:
        self.config = config
        if teacher is not None and config.distill is None:
            cure = "Set for example distill=0.5."
            raise ValueError(explain("QuantConfig.distill", "a weight for what the teacher says", None, cure))
        self._distiller = None if config.distill is None else Distiller(config.distill, teacher)
        self.estimator = build_estimator(config.method, dict(config.options))
        check_setup(config)
        if config.distill is not None and teacher is None and rounds(config):
            got, cure = "the model itself, whose weights are rounded", "Give one, or leave the rounding out of setup."
            raise ValueError(explain("QuantConfig.distill", "a teacher with float weights", got, cure))
        self.schedules = {**self.estimator.role(False).schedules(), **self.estimator.role(True).schedules()}
        self.report: Report | None = None
        self.total_steps: int | None = None
        self.step = 0
        self.start = 0
        self.starting = False
        self._latest = -1
        self._observed = config.calibration
        self._now: dict[str, float] = {}
        self._loss_scale: float | Tensor = 1.0
        self._model: nn.Module | None = None
        self._trained = self._evaluated = False
        self._holds: bool | None = None
        self._quantizers: list[FakeQuantizer] = []
        self._shared: list[list[FakeQuantizer]] = []
        self._weights: dict[FakeQuantizer, QuantLayer] = {}
        self._scheduled: list[tuple[str, Schedule, list[Tensor]]] = []
        self._turns: list[Tensor] = []
        self._measures = False
        self._names: dict[FakeQuantizer, str] = {}
        self._starts: dict[FakeQuantizer, Tensor] = {}
        self._codes: dict[FakeQuantizer, Tensor] = {}
        self._setup_data: list[Any] | None = None

    def prepare(
        self,
        model: nn.Module,
        root: nn.Module | None = None,
        batches: Callable[[], Iterable[Any]] | None = None,
        loaded: bool = False,
        wait: bool = False,
    ) -> Report | None:
        """Attach, unless the model already holds quantizers (a second stage of the same run, or put there by hand).

        Args:
            model: What is quantized.
            root: What is trained, if the model is a part of it: distillation's module is looked for there.
            batches: Makes the data that ``QuantConfig.setup`` runs on, which it does here, once.
            loaded: Without ``batches``: the weights come from a checkpoint of a run that did.
            wait: Leave the steps of ``QuantConfig.setup`` that need quantizers to ``finish_set_up``, where it is not
                known yet whether a checkpoint comes.

        Raises:
            AttachError: The model cannot be quantized as asked, or is already, in another way or without its set-up.
            ValueError: ``QuantConfig.setup`` without data.
        """
        self._model = model
        if not is_attached(model):
            done = self._set_up(model, batches, loaded) if self.config.setup else None
            self.report = attach(model, self.config)
            self.report.setup = done
            freeze_with_weights(model)
            if not wait:
                self.finish_set_up()
        elif batches is not None and self.report is not None and self.report.setup == LEFT:
            cure = "Fit first; or build the module and the callback anew."
            got = "one attached without, for weights of a checkpoint"
            raise AttachError(explain("QuantConfig.setup", "a model that its transforms were run on", got, cure))
        refuse_other_config(model, self.config, self.estimator)
        refuse_late_adapters(model)
        if self._distiller is not None:
            self._distiller.find(model if root is None else root)
        if self.config.delay:
            for _, q in quantizers(model):
                q.track_start()
        return self.report

    def _set_up(
        self, model: nn.Module, batches: Callable[[], Iterable[Any]] | None, loaded: bool
    ) -> TransformReport | str:
        if batches is not None:
            refuse_unfit(model)
            self._setup_data = of_first_rank(model, batches(), self.config.setup_batches)
            return set_up(model, self.config, self._setup_data)
        if not loaded:
            cure = "Call prepare(model, batches=lambda: loader)."
            raise ValueError(explain("QuantConfig.setup", "training data to look at", None, cure))
        restructure(model, self.config)
        return LEFT

    def finish_set_up(self, loaded: bool = False) -> bool:
        """Run the steps of ``QuantConfig.setup`` that wait for it, once.

        Args:
            loaded: A checkpoint's weights and ranges are in place: they went through these steps, which are left out.

        Returns:
            Whether something was run.
        """
        data, self._setup_data = self._setup_data, None
        report = None if self.report is None else self.report.setup
        if data is None or report is None or not report.waiting:
            return False
        if loaded:
            self.report.setup = LOADED  # type: ignore[union-attr]
            return False
        set_up_attached(self.model, self.config, data, report)
        return True

    def begin(self, total_steps: int | None) -> None:
        """Fix the length of the run.

        Args:
            total_steps: Optimizer steps in all, None if unknown.

        Raises:
            ValueError: A schedule or the delay needs the length and it is not known.
            AttachError: A state that cannot follow its sharded weight.
        """
        self.total_steps = total_steps
        self.start, self._latest = delay_steps(self.config.delay, total_steps), -1
        self._now.update(self.values())
        own = self.estimator.role(False).calibration(total_steps)
        calibration = 0 if sets_ranges(self.config) else self.config.calibration
        self._observed = max(self.start + calibration, own)
        fit_weights(self.model, missing=True)
        found = list(quantizers(self.model))
        self._quantizers = [q for _, q in found]
        self._shared = shared_inputs(self.model)
        self._names = {q: f"{path}/" for path, q in found}
        self._weights = {}
        for path, layer in quant_layers(self.model):
            self._weights[layer.weight_quant] = layer
            self._names[layer.weight_quant] = f"{path}/weight_"
            if layer.input_quant is not None:
                self._names[layer.input_quant] = f"{path}/input_"
            if layer.weight_quant.estimator.holds_elements and hasattr(layer.weight, "to_local"):
                name = type(layer.weight_quant.estimator).__name__.lower()
                expected = f"a whole weight for the state per element that {name} keeps"
                cure = 'For pege use theta="group"; else choose a method without such state, or DDP.'
                raise AttachError(explain(path, expected, "a sharded one", cure))
        buffers: dict[tuple[str, Schedule], list[Tensor]] = {}
        for q in self._quantizers:
            q.now = self._now
            for name, schedule in q.estimator.schedules().items():
                buffers.setdefault((name, schedule), []).append(q._buffers[name])  # type: ignore[arg-type]
        self._scheduled = [(name, schedule, found) for (name, schedule), found in buffers.items()]
        self._turns = [q.turn[0] for q in self._quantizers if q.turn is not None]
        with self._learned_whole():
            self._starts = {q: scales for q in self._quantizers if (scales := learned_scales(q)) is not None}
        self._trained = self._evaluated = False
        self._holds = None if self.config.freeze_batch_norm is not None else False
        if self._holds is None and not total_steps:
            expected, cure = "the number of optimizer steps of the run", "Set max_steps or max_epochs."
            raise ValueError(explain("freeze_batch_norm", expected, total_steps, cure))

    @property
    def model(self) -> nn.Module:
        """The model given to ``prepare``."""
        if self._model is None:
            raise RuntimeError("QuantController: expected prepare(model) first, got no model. Call prepare.")
        return self._model

    def values(self, step: int | None = None) -> dict[str, float]:
        """The scheduled values at an optimizer step (default: the current one)."""
        at = self.step if step is None else step
        return {name: self._value(name, schedule, at) for name, schedule in self.schedules.items()}

    def _value(self, name: str, schedule: Schedule, step: int) -> float:
        """A scheduled value; nothing pulls towards a grid that training does not round to yet."""
        value = schedule(step, self.total_steps)
        return 0.0 if name == "lam" and step < self.start else value

    def on_step(self, step: int, loss_scale: float | Tensor = 1.0, measure: bool = False, alone: bool = False) -> None:
        """Before a training forward: fill the scheduled buffers, open or close the observers.

        Args:
            step: Optimizer steps done so far.
            loss_scale: What the gradient of the mean loss is multiplied with in this backward: the
                gradient scaler's factor over the number of accumulated micro-batches.
            measure: Let this step's forward and update measure for ``metrics``; the same on every rank.
            alone: The update takes the gradient of one backward of this process and nothing else: state per element
                may move in it.
        """
        self.step, self._loss_scale, self._measures, self._codes = step, loss_scale, measure, {}
        self.starting = 0 < self.start == step != self._latest
        self._latest = step
        if self.starting:
            fit_weights(self.model)
            self._starts = {q: scales for q, scales in self._starts.items() if q not in self._weights}
        for name, schedule, buffers in self._scheduled:
            value = self._value(name, schedule, step)
            _fill(buffers, value * loss_scale if name == "lam" else value)
        _fill([q.step for q in self._quantizers if "step" in q._buffers], step)
        _fill(self._turns, ALONE if alone else ACCUMULATES)
        _fill([q.started for q in self._quantizers if q.delayed], float(step >= self.start))
        self._hold_statistics(step)
        observing = step < self._observed
        if observing or any(q.observing for q in self._quantizers):
            open_observers(self.model, observing)
        self._now.update(self.values())
        for q in self._quantizers:
            if q.measuring != measure:
                q.measuring = measure
        if self._distiller is not None and step >= self.start:
            self._distiller.open(loss_scale, measure)

    def _hold_statistics(self, step: int) -> None:
        """Batch normalization keeps its statistics from a share of the run on."""
        share = self.config.freeze_batch_norm
        if share is None:
            return
        holds = step >= share * (self.total_steps or 0)
        if holds != self._holds:
            self._holds = holds
            hold_statistics(self.model, holds)

    def wants_curvature(self, step: int) -> bool:
        """Whether ``update_curvature`` is due before this optimizer step."""
        rule: Any = self.estimator
        if not rule.follows_curvature or step == 0 or step < self.start:
            return False
        if self.total_steps is None:
            expected = "the number of optimizer steps of the run"
            raise ValueError(explain("ewgs.delta='hessian'", expected, None, "Set max_steps or max_epochs."))
        return bool(step % max(1, round(rule.period * self.total_steps)) == 0)

    def update_curvature(self, loss: Callable[[], Tensor]) -> None:
        """Measure the loss's curvature on the current batch, where the method follows it.

        Args:
            loss: Runs the forward of the current batch, changing nothing else, and returns the scalar loss.
        """
        rule: Any = self.estimator
        with nullcontext() if self._distiller is None else self._distiller.paused():
            found = curvature(self.model, loss, self.step, rule.probes, rule.tolerance)
        for q, (trace, spread) in found.items():
            q.estimator.take_curvature(q, trace, spread)

    def before_optimizer_step(self, optimizer: Optimizer | None = None) -> None:
        """After backward: update state that no optimizer holds.

        Args:
            optimizer: The one about to step; state of weights it does not hold waits for theirs.
        """
        if self._measures and not self._codes:  # of several optimizers in one batch before the first
            self._codes = dict(self._codes_of(self._weights))
        stepped = {q: layer for q, layer in self._weights.items() if q.estimator.holds_elements}
        if not stepped or self.step < self.start:
            return
        held = None if optimizer is None else {id(p) for g in optimizer.param_groups for p in g["params"]}
        for q, layer in stepped.items():
            if held is None or id(layer.weight) in held:
                with zero.gathered([layer.weight, *q.parameters()]), zero.with_gradient(layer.weight):
                    q.estimator.before_optimizer_step(q, layer.weight)  # type: ignore[arg-type]

    def after_optimizer_step(self, skipped: bool = False) -> None:
        """After an update: take observed ranges in, project learned state, check coverage once.

        Args:
            skipped: A gradient scaler left the update out: weights are where they were, so nothing is projected
                and no oscillation counted.
        """
        commit_ranges(self.model)
        with zero.written(p for q in self._quantizers for p in q.parameters()):
            _floor_scales(self._quantizers)
            for q in self._quantizers:
                if self.step >= self.start and not skipped:
                    self._project(q)
                if not q.spec.dynamic and q.ready:
                    q.range.project(q)
            average(self._shared)
        for q, now in self._codes_of(list(self._codes)) if self._codes else ():
            q.measured["flips"] = flips(self._codes.pop(q), now)
        if not self._trained:
            self._trained = True
            check_coverage(self.model, self.config.coverage, "training")
        if self._distiller is not None:
            self._distiller.check(self.config.coverage)

    def _project(self, q: FakeQuantizer) -> None:
        layer, rule = self._weights.get(q), q.estimator
        packed = layer is None or isinstance(layer, CompactLinear)  # frozen, and dense only while in use
        weight = None if packed else layer.weight  # type: ignore[union-attr]
        with zero.written([weight]) if weight is not None and rule.moves_weights else nullcontext():
            rule.project(q, weight)

    def _learned_whole(self) -> AbstractContextManager[None]:
        return zero.gathered(p for q in self._quantizers for p in q.parameters())

    @torch.no_grad()
    def _codes_of(self, weights: Iterable[FakeQuantizer]) -> Iterator[tuple[FakeQuantizer, Tensor]]:
        """Codes of these weights one after the other, as evaluation has them: without the dropout of adapters."""
        with evaluating(self.model):
            for q in weights:
                with zero.gathered([*self._weights[q].sources(), *q.parameters()]):
                    found = codes(q, self._weights[q].folded()[0])
                yield q, found

    def on_eval(self) -> None:
        """Before evaluation: observers closed, nothing measured or taught, training's calls forgotten.

        Before quantization starts, evaluation's weight ranges are those of the weights as they are.
        """
        open_observers(self.model, False)
        if self._distiller is not None:
            self._distiller.close()
        if self.step < self.start:
            fit_weights(self.model)
        for _, q in quantizers(self.model):
            q.measuring = False
            if not self._evaluated:
                q.called = False

    def after_eval_batch(self) -> None:
        """After the first evaluation batch of the run: check coverage."""
        if not self._evaluated:
            self._evaluated = True
            check_coverage(self.model, self.config.coverage, "evaluation")

    def split_groups(self, optimizers: list[Optimizer], schedulers: list[Any]) -> None:
        """Give the quantizers' parameters their own optimizer groups: see ``optim.split_groups``."""
        split_groups(optimizers, schedulers, self.model, self.config)

    def metrics(self, layers: bool = False) -> dict[str, float]:
        """Scheduled values now, and what ``lightning_quant.metrics`` says of quantizers: a collective under sharding.

        ``distill`` is what the last forward's distillation adds to the loss.

        Args:
            layers: Also those of every layer, as ``path/weight_error``, ``path/input_clip``; other quantizers' have
                their own path, ``path/error``.
        """
        with self._learned_whole():
            found = {q: readings(q, self._starts) for q in self._quantizers}
        for metrics in found.values():
            if "progressive_loss" in metrics:
                metrics["progressive_loss"] = metrics["progressive_loss"] / self._loss_scale
        numbers = iter(to_floats(value for metrics in found.values() for value in metrics.values()))
        figures = {q: {name: next(numbers) for name in metrics} for q, metrics in found.items()}
        out = {**self.values(), **summary(figures)}
        if self._distiller is not None and self._distiller.value is not None:
            out["distill"] = float(self._distiller.value)
        if layers:
            out |= {self._names[q] + name: value for q, own in figures.items() for name, value in own.items()}
        return out

    def state_dict(self) -> dict[str, Any]:
        """Version, config and step: plain types."""
        return {"version": STATE_VERSION, "step": self.step, "config": self.config.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the step over; refuse a run that was trained with another grid.

        Raises:
            ValueError: Another version, or another config where it decides what the weights mean.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                explain(
                    "QuantController state", f"version {STATE_VERSION}", state.get("version"), "Retrain, or convert."
                )
            )
        now, then = self.config.to_dict(), QuantConfig.from_dict(state["config"], "QuantController state").to_dict()
        for key in SAME:
            if then[key] != now[key]:
                raise ValueError(
                    explain(
                        f"QuantController state, {key}",
                        f"the checkpoint's {then[key]!r}",
                        repr(now[key]),
                        "Resume with the config the run was started with.",
                    )
                )
        self.step = int(state["step"])


def _fill(tensors: list[Tensor], value: float | Tensor) -> None:
    if not tensors:
        return
    torch._foreach_zero_(tensors)
    if isinstance(value, Tensor):
        value = value.to(tensors[0].device)
    torch._foreach_add_(tensors, value)


@torch.no_grad()
def _floor_scales(all_quantizers: list[FakeQuantizer]) -> None:
    """Learned scales stay positive: at least 1e-6 (real), which no trained scale comes near."""
    scales = [q.scale.data for q in all_quantizers if isinstance(q._parameters.get("scale"), nn.Parameter) and q.ready]
    if scales:
        torch._foreach_clamp_min_(scales, 1e-6)
