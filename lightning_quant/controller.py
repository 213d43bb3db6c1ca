"""QuantController: drives quantizers through a training run.  Knows no framework.

Everything it does is a function of the optimizer step, so resuming needs the step alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_quant.attach import Report, attach, check_coverage, is_attached, quant_layers, quantizers
from lightning_quant.calibration import commit_ranges, open_observers
from lightning_quant.curvature import curvature
from lightning_quant.distributed import whole
from lightning_quant.errors import AttachError, explain
from lightning_quant.estimators import build_estimator
from lightning_quant.optim import split_groups
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.schedule import Schedule
from lightning_quant.spec import QuantConfig

STATE_VERSION = 1


class QuantController:
    """One training run's quantization: attach, schedules, observers, coverage, metrics.

    The front end calls, in this order: ``prepare`` before the optimizer exists, ``begin`` once the run's
    length is known, ``on_step`` before each forward of training (and ``update_curvature`` after it where
    ``wants_curvature``), ``before_optimizer_step`` and ``after_optimizer_step`` around each update, ``on_eval``
    before evaluation, ``after_eval_batch`` in it.

    Args:
        config: What to quantize and how; checked here, before any work.
    """

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.estimator = build_estimator(config.method, dict(config.options))
        self.schedules = {**self.estimator.role(False).schedules(), **self.estimator.role(True).schedules()}
        self.report: Report | None = None
        self.total_steps: int | None = None
        self.step = 0
        self._observed = config.calibration
        self._now: dict[str, float] = {}
        self._loss_scale: float | Tensor = 1.0
        self._model: nn.Module | None = None
        self._trained = self._evaluated = False
        self._quantizers: list[FakeQuantizer] = []
        self._weights: dict[FakeQuantizer, nn.Module] = {}
        self._scheduled: list[tuple[str, Schedule, list[Tensor]]] = []

    def prepare(self, model: nn.Module) -> Report | None:
        """Attach, unless the model already holds quantizers (a second stage of the same run)."""
        self._model = model
        if not is_attached(model):
            self.report = attach(model, self.config)
        return self.report

    def begin(self, total_steps: int | None) -> None:
        """Fix the length of the run.

        Args:
            total_steps: Optimizer steps in all, None if unknown.

        Raises:
            ValueError: A schedule needs the length and it is not known.
            AttachError: A state that cannot follow its sharded weight.
        """
        self.total_steps = total_steps
        self._now.update(self.values())
        self._observed = max(self.config.calibration, self.estimator.role(False).calibration(total_steps))
        self._quantizers = [q for _, q in quantizers(self.model)]
        self._weights = {}
        for path, layer in quant_layers(self.model):
            self._weights[layer.weight_quant] = layer
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
        self._trained = self._evaluated = False

    @property
    def model(self) -> nn.Module:
        """The model given to ``prepare``."""
        if self._model is None:
            raise RuntimeError("QuantController: expected prepare(model) first, got no model. Call prepare.")
        return self._model

    def values(self, step: int | None = None) -> dict[str, float]:
        """The scheduled values at an optimizer step (default: the current one)."""
        at = self.step if step is None else step
        return {name: schedule(at, self.total_steps) for name, schedule in self.schedules.items()}

    def on_step(self, step: int, loss_scale: float | Tensor = 1.0, measure: bool = False) -> None:
        """Before a training forward: fill the scheduled buffers, open or close the observers.

        Args:
            step: Optimizer steps done so far.
            loss_scale: What the gradient of the mean loss is multiplied with in this backward: the
                gradient scaler's factor over the number of accumulated micro-batches.
            measure: Let the forward measure errors for ``metrics``.
        """
        self.step, self._loss_scale = step, loss_scale
        for name, schedule, buffers in self._scheduled:
            value = schedule(step, self.total_steps)
            _fill(buffers, value * loss_scale if name == "lam" else value)
        _fill([q.step for q in self._quantizers if "step" in q._buffers], step)
        observing = step < self._observed
        if observing or any(q.observing for q in self._quantizers):
            open_observers(self.model, observing)
        self._now.update(self.values())
        for q in self._quantizers:
            if q.measuring != measure:
                q.measuring = measure

    def wants_curvature(self, step: int) -> bool:
        """Whether ``update_curvature`` is due before this optimizer step."""
        rule: Any = self.estimator
        if not rule.follows_curvature or step == 0:
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
        for q, (trace, spread) in curvature(self.model, loss, self.step, rule.probes, rule.tolerance).items():
            q.estimator.take_curvature(q, trace, spread)

    def before_optimizer_step(self, optimizer: Optimizer | None = None) -> None:
        """After backward: update state that no optimizer holds.

        Args:
            optimizer: The one about to step; state of weights it does not hold waits for theirs.
        """
        stepped = {q: layer for q, layer in self._weights.items() if q.estimator.holds_elements}
        if not stepped:
            return
        held = None if optimizer is None else {id(p) for g in optimizer.param_groups for p in g["params"]}
        for q, layer in stepped.items():
            if held is None or id(layer.weight) in held:
                q.estimator.before_optimizer_step(q, layer.weight)  # type: ignore[arg-type]

    def after_optimizer_step(self) -> None:
        """After an update: take observed ranges in, project learned state, check coverage once."""
        commit_ranges(self.model)
        _floor_scales(self._quantizers)
        for q in self._quantizers:
            layer = self._weights.get(q)
            q.estimator.project(q, None if layer is None else layer.weight)  # type: ignore[arg-type]
            if not q.spec.dynamic and q.ready:
                q.range.project(q)
        if not self._trained:
            self._trained = True
            check_coverage(self.model, self.config.coverage, "training")

    def on_eval(self) -> None:
        """Before evaluation: observers closed, nothing measured, training's calls forgotten."""
        open_observers(self.model, False)
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

    def metrics(self) -> dict[str, float]:
        """Scheduled values now, and means over quantizers of state and of what the last forward measured."""
        out = dict(self.values())
        sums: dict[str, list[Tensor]] = {}
        for q in self._quantizers:
            name = "error" if q.is_weight else "input_error"
            if "error" in q.measured:
                sums.setdefault(name, []).append(q.measured["error"])
            if "progressive_loss" in q.measured:
                sums.setdefault("progressive_loss", []).append(q.measured["progressive_loss"])
            for key, value in q.estimator.metrics(q).items():
                sums.setdefault(key, []).append(value)
        for key, values in sums.items():
            stacked = torch.stack([whole(v).float() for v in values])
            out[key] = float(stacked.sum() / self._loss_scale if key == "progressive_loss" else stacked.mean())
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
        for key in ("method", "weight", "activation", "rules", "options"):
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
