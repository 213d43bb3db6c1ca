"""QuantCallback: quantization-aware training for any LightningModule.  Each hook is a call to the controller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_quant.attach import Report, is_attached
from lightning_quant.controller import QuantController
from lightning_quant.errors import AttachError, explain
from lightning_quant.estimators import Estimator
from lightning_quant.layers import layer_class
from lightning_quant.spec import SPEC_VERSION, LayerRule, QuantConfig

if TYPE_CHECKING:
    from lightning_quant.export import ExportReport


class QuantCallback(Callback):
    """Train a LightningModule on the grid it will be deployed on.

    Quantizers are attached in ``setup`` (every stage, once), so that the optimizer sees their parameters and
    checkpoints find their keys.  Evaluation always runs the hard low-bit model.  Nothing is converted when
    fitting ends: call ``export``.  With manual optimization schedules advance by batches, since every
    optimizer's steps count in ``trainer.global_step``.

    Args:
        method: Name in ``ESTIMATORS``, or an ``Estimator`` of your own.
        scheme: Scheme string, e.g. ``"w8a8"`` or ``"w4a16-g32"``.
        config: A ``QuantConfig`` or the path of its YAML file, in place of ``method``, ``scheme``, ``rules``
            and ``options``.
        rules: Per-layer overrides: ``LayerRule`` objects or mappings of their fields.
        log_every_n_steps: How often metrics go to the trainer's loggers, in optimizer steps (0: never;
            None: as often as the trainer logs).  Only those steps pay for measuring.
        options: Fields of ``QuantConfig`` and the method's own settings, e.g. ``{"theta": "element"}``.

    Raises:
        ValueError: A bad setting, before any work.
    """

    def __init__(
        self,
        method: str | Estimator = "pege",
        scheme: str = "w8a8",
        config: QuantConfig | str | None = None,
        rules: list[LayerRule | dict[str, Any]] | None = None,
        log_every_n_steps: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if config is None:
            config = QuantConfig.parse(method, scheme, rules=_rules(rules or []), **(options or {}))
        elif (method, scheme) != ("pege", "w8a8") or rules or options:
            raise ValueError(
                explain(
                    "QuantCallback.config", "to stand alone", "method, scheme, rules or options beside it", "Drop one."
                )
            )
        elif not isinstance(config, QuantConfig):
            config = QuantConfig.from_yaml(config)
        self.controller = QuantController(config)
        self.log_every_n_steps = log_every_n_steps
        self._stepped = 0

    @property
    def config(self) -> QuantConfig:
        """What is quantized and how."""
        return self.controller.config

    @property
    def report(self) -> Report | None:
        """What was attached, once ``setup`` has run."""
        return self.controller.report

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, before weights are restored and the optimizer is built."""
        reachable = any(layer_class(type(m)) is not None for m in pl_module.modules())
        if not is_attached(pl_module) and not reachable:
            pl_module.configure_model()
        known = self.report
        if self.controller.prepare(pl_module) is not known:
            rank_zero_info(f"QuantCallback: {self.report}")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the run's length, give quantizer parameters their optimizer groups."""
        self._refuse_late_layers(pl_module)
        _refuse_float_copies(trainer)
        steps = trainer.estimated_stepping_batches
        if not pl_module.automatic_optimization and trainer.max_steps > 0:
            steps = min(steps, math.ceil(trainer.max_steps / max(len(trainer.optimizers), 1)))
        self.controller.begin(int(steps) if steps != float("inf") and steps >= 0 else None)
        if self.controller.estimator.follows_curvature and not pl_module.automatic_optimization:
            got = "manual optimization, whose training_step steps optimizers itself"
            cure = "Use a fixed delta, or call controller.update_curvature(loss) yourself."
            raise ValueError(explain("ewgs.delta='hessian'", "automatic optimization", got, cure))
        self.controller.split_groups(trainer.optimizers, [c.scheduler for c in trainer.lr_scheduler_configs])

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Fill schedules for this optimizer step."""
        self._stepped = trainer.global_step
        step, every = _step(trainer, pl_module), self._every(trainer)
        self.controller.on_step(step, _loss_scale(trainer, pl_module), bool(every) and (step + 1) % every == 0)
        if batch_idx % trainer.accumulate_grad_batches == 0 and self.controller.wants_curvature(step):
            self.controller.update_curvature(lambda: _loss(trainer, pl_module, batch, batch_idx))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Update state no optimizer holds."""
        self.controller.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: ranges, projections, coverage, metrics."""
        stepped, every = trainer.global_step != self._stepped, self._every(trainer)
        if stepped:
            self.controller.after_optimizer_step()
        if every and (self.controller.step + 1) % every == 0 and (stepped or not pl_module.automatic_optimization):
            metrics = {f"quant/{name}": value for name, value in self.controller.metrics().items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=self.controller.step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observers stay out of evaluation."""
        self.controller.on_eval()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observers stay out of evaluation."""
        self.controller.on_eval()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observers stay out of evaluation."""
        self.controller.on_eval()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observers stay out of whatever the module is used for next."""
        self.controller.on_eval()

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Coverage of evaluation."""
        self.controller.after_eval_batch()

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Coverage of evaluation."""
        self.controller.after_eval_batch()

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Coverage of evaluation."""
        self.controller.after_eval_batch()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The optimizer step and the config; weights and quantizer state travel with the module."""
        return self.controller.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the run goes on with the config it was started with."""
        self.controller.load_state_dict(state_dict)

    def export(
        self, module: LightningModule, path: str | Path, format: str | None = None, **kwargs: Any
    ) -> ExportReport:
        """Write the low-bit model: see ``lightning_quant.export.export``.

        Args:
            module: The trained module, or an inner model of it.
            path: A directory that does not exist yet.
            format: A name in ``FORMATS``; None: compressed-tensors for a transformers model, else folded.
            kwargs: Passed on.
        """
        from lightning_quant.export import export

        return export(module, path, format=format, config=self.config, **kwargs)

    def _every(self, trainer: Trainer) -> int:
        if not trainer.loggers:
            return 0
        every = self.log_every_n_steps
        return int(trainer.log_every_n_steps if every is None else every)  # type: ignore[attr-defined]

    def _refuse_late_layers(self, module: LightningModule) -> None:
        """Complain about layers that ``configure_model`` made or replaced after ``setup`` attached."""
        if self.report is None:
            return
        excluded = {entry.path for entry in self.report.excluded}
        late = [p for p, m in module.named_modules() if layer_class(type(m)) is not None and p not in excluded]
        if late:
            raise AttachError(
                explain(
                    late[0],
                    "every layer to exist when quantizers are attached",
                    f"{len(late)} made later",
                    "Make all layers in __init__, or all in a configure_model that does nothing when called again.",
                )
            )


def _rules(rules: list[LayerRule | dict[str, Any]]) -> list[LayerRule]:
    """Rules from mappings, checked the way a YAML file's are."""
    return [
        r
        if isinstance(r, LayerRule)
        else QuantConfig.from_dict({"version": SPEC_VERSION, "rules": [r]}, "QuantCallback").rules[0]
        for r in rules
    ]


def _refuse_float_copies(trainer: Trainer) -> None:
    """Complain about a ``WeightAveraging`` that copied the module before quantizers were attached."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        copy = getattr(callback, "_average_model", None)
        if copy is not None and not is_attached(copy):
            raise ValueError(
                explain(
                    type(callback).__name__,
                    "to copy the module after QuantCallback attached its quantizers",
                    "a copy in float",
                    "Put QuantCallback before it in Trainer(callbacks=[...]).",
                )
            )


def _step(trainer: Trainer, pl_module: LightningModule) -> int:
    """Optimizer steps done; with manual optimization batches, for ``global_step`` adds all optimizers' up."""
    if pl_module.automatic_optimization:
        return int(trainer.global_step)
    return int(trainer.fit_loop.epoch_loop.total_batch_idx)


def _loss(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """The loss of a batch by one more call of ``training_step``, with nothing logged."""
    module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        with trainer.precision_plugin.forward_context():
            out: Any = module.training_step(batch, batch_idx)
    finally:
        del module.__dict__["log"]
    return out["loss"] if isinstance(out, Mapping) else out


def _loss_scale(trainer: Trainer, pl_module: LightningModule) -> float:
    """What Lightning multiplies a loss with before backward: the gradient scaler over accumulation."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / trainer.accumulate_grad_batches if pl_module.automatic_optimization else scale
