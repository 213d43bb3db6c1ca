"""QuantCallback: quantization-aware training for any LightningModule.  Each hook is a call to the controller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_quant.attach import Report, is_attached
from lightning_quant.controller import QuantController
from lightning_quant.layers import layer_class
from lightning_quant.spec import LayerRule, QuantConfig

if TYPE_CHECKING:
    from lightning_quant.export import ExportReport


class QuantCallback(Callback):
    """Train a LightningModule on the grid it will be deployed on.

    Quantizers are attached in ``setup`` (every stage, once), so that the optimizer sees their parameters and
    checkpoints find their keys.  Evaluation always runs the hard low-bit model.  Nothing is converted when
    fitting ends: call ``export``.

    Args:
        method: Name in ``ESTIMATORS``.
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
        method: str = "pege",
        scheme: str = "w8a8",
        config: QuantConfig | str | None = None,
        rules: list[LayerRule | dict[str, Any]] | None = None,
        log_every_n_steps: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if config is None:
            parsed = [r if isinstance(r, LayerRule) else LayerRule(**r) for r in rules or ()]
            config = QuantConfig.parse(method, scheme, rules=parsed, **(options or {}))
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
        self.controller.prepare(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the run's length, give quantizer parameters their optimizer groups."""
        steps = trainer.estimated_stepping_batches
        self.controller.begin(int(steps) if steps != float("inf") and steps >= 0 else None)
        self.controller.split_groups(trainer.optimizers, [c.scheduler for c in trainer.lr_scheduler_configs])

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Fill schedules for this optimizer step."""
        self._stepped = trainer.global_step
        self.controller.on_step(trainer.global_step, _loss_scale(trainer, pl_module), self._logs_next(trainer))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Update state no optimizer holds."""
        self.controller.before_optimizer_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: ranges, projections, coverage, metrics."""
        if trainer.global_step == self._stepped:
            return
        self.controller.after_optimizer_step()
        if self._every(trainer) and trainer.global_step % self._every(trainer) == 0:
            metrics = {f"quant/{name}": value for name, value in self.controller.metrics().items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step - 1)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observers stay out of evaluation."""
        self.controller.on_eval()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observers stay out of evaluation."""
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

    def _logs_next(self, trainer: Trainer) -> bool:
        every = self._every(trainer)
        return bool(every) and (trainer.global_step + 1) % every == 0


def _loss_scale(trainer: Trainer, pl_module: LightningModule) -> float:
    """What Lightning multiplies a loss with before backward: the gradient scaler over accumulation."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / trainer.accumulate_grad_batches if pl_module.automatic_optimization else scale
