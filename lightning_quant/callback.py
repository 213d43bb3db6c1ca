"""QuantCallback: quantization-aware training for any LightningModule.  Each hook is a call to the controller."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_quant.attach import quant_layers
from lightning_quant.controller import QuantController
from lightning_quant.errors import explain
from lightning_quant.estimators import Estimator
from lightning_quant.lightning_support import (
    Module,
    batch_loss,
    forget_best,
    is_alone,
    load_quantized,
    loss_scale,
    optimizer_steps,
    refuse_float_checkpoints,
    refuse_float_copies,
    run_length,
    training_inputs,
)
from lightning_quant.parts import find_part, has_layers, refuse_changes, refuse_shared
from lightning_quant.report import Report
from lightning_quant.settings import build_config
from lightning_quant.spec import LayerRule, QuantConfig

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from lightning_quant.export import ExportReport


class QuantCallback(Callback):
    """Train a LightningModule on the grid it will be deployed on.

    Quantizers are attached in ``setup`` (every stage, once), so that the optimizer sees their parameters and
    checkpoints find their keys.  Evaluation always runs the hard low-bit model.  Nothing is converted when
    fitting ends: call ``export``.  With manual optimization schedules advance by batches, since every
    optimizer's steps count in ``trainer.global_step``.

    A checkpoint holds the quantizers' state under keys of its own: ``ckpt_path`` takes it in every stage, and
    ``QuantCallback.load_from_checkpoint(MyModule, path)`` loads it without a trainer, which
    ``MyModule.load_from_checkpoint(path)`` refuses for the keys it does not know.

    Args:
        method: Name in ``ESTIMATORS``, or an ``Estimator`` of your own.
        scheme: Scheme string, e.g. ``"w8a8"`` or ``"w4a16-g32"``.
        config: A ``QuantConfig`` or the path of its YAML file, in place of ``method``, ``scheme``, ``rules``,
            ``schedule``, ``options`` and the config's own fields.
        rules: Per-layer overrides: ``LayerRule`` objects or mappings of their fields.
        schedule: Scheduled settings of the method: name (``lam``, ``alpha``, ...) -> a number, or the fields of
            a ``Schedule``, e.g. ``{"lam": {"curve": "cosine", "end": 0.01, "delay": 0.3}}``.
        calibration: See ``QuantConfig``.
        delay: See ``QuantConfig``.  When quantization starts, checkpoint and early-stopping callbacks forget
            their best scores, which are those of another model.
        strict: See ``QuantConfig``.
        module: Path of the submodule to quantize, with rules and report relative to it; None: all of the
            LightningModule.  Several callbacks serve several parts; each logs under ``quant/<module>/``.
        log_every_n_steps: How often metrics go to the trainer's loggers, in optimizer steps (0: never;
            None: as often as the trainer logs).  Only those steps pay for measuring.
        options: Fields of ``QuantConfig`` and the method's own settings, e.g. ``{"theta": "element"}``.
        log_layers_every_n_steps: How often each layer's own metrics are logged along with them, in optimizer
            steps (0: never), as ``quant/body.0/weight_error`` and so on: see ``lightning_quant.metrics``.
        distill: Learn from the float model as well: a weight, or a mapping of the fields of ``spec.Distill``, whose
            ``module`` is a path in the LightningModule (None: what ``self(batch)`` returns are the logits).  What
            ``training_step`` logs stays the loss of the task; the term is logged as ``quant/distill``.
        teacher: Learn from this model instead, called as the student is: better than the module's own weights where
            all of them are trained.
        setup: What is done before training: see ``QuantConfig``, e.g. ``"light"`` or ``["smoothquant", "gptq"]``.
            They look at the first ``QuantConfig.setup_batches`` batches that ``training_step`` gets.  A checkpoint's
            weights went through them already and are loaded over the result; roundings are left out then, unless the
            strategy shards the module before it loads.  Other stages than fit run none.

    Raises:
        ValueError: A bad setting, before any work.
    """

    def __init__(
        self,
        method: str | Estimator = "pege",
        scheme: str = "w8a8",
        config: QuantConfig | str | None = None,
        rules: list[LayerRule | dict[str, Any]] | None = None,
        schedule: dict[str, dict[str, Any] | float] | None = None,
        calibration: int | None = None,
        delay: float | None = None,
        strict: bool | None = None,
        module: str | None = None,
        log_every_n_steps: int | None = None,
        options: dict[str, Any] | None = None,
        log_layers_every_n_steps: int = 0,
        distill: float | dict[str, Any] | None = None,
        teacher: nn.Module | None = None,
        setup: str | list[str | dict[str, Any]] | None = None,
    ) -> None:
        fields: dict[str, Any] = {"calibration": calibration, "delay": delay, "strict": strict, "distill": distill}
        fields["setup"] = setup
        config = build_config(method, scheme, config, rules, schedule, options, **fields)
        self.controller = QuantController(config, teacher)
        self.log_every_n_steps, self.log_layers_every_n_steps = log_every_n_steps, log_layers_every_n_steps
        for name in ("log_every_n_steps", "log_layers_every_n_steps"):
            if (steps := getattr(self, name) or 0) < 0:
                raise ValueError(explain(f"QuantCallback.{name}", "0 or more steps", steps, "Use 0 for never."))
        self.module = module or None
        self._logs = False
        self._stepped = self._layers = 0
        self._scale = 1.0
        self._guard: RemovableHandle | None = None

    @property
    @override
    def state_key(self) -> str:
        """Tells the callbacks of several parts apart in a checkpoint."""
        return type(self).__qualname__ if self.module is None else self._generate_state_key(module=self.module)

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
        paths = [c.module for c in trainer.callbacks if isinstance(c, QuantCallback)]  # type: ignore[attr-defined]
        if not all(has_layers(pl_module, path) for path in paths):
            pl_module.configure_model()
        refuse_shared({path: find_part(pl_module, path) for path in paths})
        part, known = find_part(pl_module, self.module), self.report
        fitting = trainer.state.fn == TrainerFn.FITTING
        batches = partial(training_inputs, trainer, pl_module, part, self.config) if fitting else None
        wait = not trainer.strategy.restore_checkpoint_after_setup  # else it is sharded before a checkpoint is known of
        if self.controller.prepare(part, pl_module, batches, not fitting, wait) is not known:
            rank_zero_info(f"{self.state_key}: {self.report}")
        self._layers = sum(1 for _ in quant_layers(part))
        self._end_guard()
        self._guard = refuse_float_checkpoints(part, type(pl_module).__name__)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What is loaded into the module after a run is the user's."""
        self._end_guard()

    def _end_guard(self) -> None:
        if self._guard is not None:
            self._guard.remove()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End set-up unless a checkpoint was loaded; give quantizer parameters their optimizer groups."""
        refuse_changes(find_part(pl_module, self.module), self.report, self._layers)
        refuse_float_copies(trainer, pl_module)
        self._logs = trainer.strategy.broadcast(bool(trainer.loggers))  # sharded metrics need every rank
        if self.controller.estimator.follows_curvature and not pl_module.automatic_optimization:
            got = "manual optimization, whose training_step steps optimizers itself"
            cure = "Use a fixed delta, or call controller.update_curvature(loss) yourself."
            raise ValueError(explain("ewgs.delta='hessian'", "automatic optimization", got, cure))
        if self.controller.finish_set_up(loaded=trainer.ckpt_path is not None) and self.report is not None:
            rank_zero_info(f"{self.state_key}: set-up: {self.report.setup}")
        self.controller.split_groups(trainer.optimizers, [c.scheduler for c in trainer.lr_scheduler_configs])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the run's length: asked for earlier, Lightning forgets where a resumable loader stood."""
        self.controller.begin(run_length(trainer, pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Fill schedules for this optimizer step."""
        self._stepped = trainer.global_step
        step, self._scale = optimizer_steps(trainer, pl_module), loss_scale(trainer, pl_module)
        due, alone = any(self._due(trainer, step)), is_alone(trainer, pl_module)
        self.controller.on_step(step, self._scale, due, alone)
        if self.controller.starting:
            forget_best(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0 and self.controller.wants_curvature(step):
            self.controller.update_curvature(lambda: batch_loss(trainer, pl_module, batch, batch_idx))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Update state no optimizer holds."""
        self.controller.before_optimizer_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step: ranges, projections, coverage, metrics."""
        stepped, (due, layers) = trainer.global_step != self._stepped, self._due(trainer, self.controller.step)
        if stepped:
            self.controller.after_optimizer_step(skipped=loss_scale(trainer, pl_module) < self._scale)
        if (due or layers) and (stepped or not pl_module.automatic_optimization):
            prefix = "quant/" if self.module is None else f"quant/{self.module}/"
            metrics = {f"{prefix}{name}": value for name, value in self.controller.metrics(layers).items()}
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
        return {**self.controller.state_dict(), "module": self.module}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the run goes on with the config it was started with."""
        self.controller.load_state_dict(state_dict)

    @classmethod
    def load_from_checkpoint(
        cls, kind: type[Module], path: str | Path, map_location: Any = None, **hparams: Any
    ) -> Module:
        """A module and its quantizers as a checkpoint holds them, in evaluation mode.

        Args:
            kind: The LightningModule's class; it is built and loaded by its own ``load_from_checkpoint``.
            path: A checkpoint that a run with this callback, or several with ``module``, wrote.
            map_location: As in ``torch.load``; code in the file never runs.
            hparams: The class's arguments, over those that ``save_hyperparameters`` put into the checkpoint.

        Raises:
            CheckpointError: The checkpoint of a float run.
        """
        return load_quantized(kind, path, cls.__qualname__, map_location, **hparams)

    def export(
        self, module: LightningModule, path: str | Path, format: str | None = None, **kwargs: Any
    ) -> ExportReport:
        """Write the low-bit model: see ``lightning_quant.export.export``.

        Args:
            module: The LightningModule that was trained (of which ``self.module`` is exported), or a model in it.
            path: A directory that does not exist yet.
            format: A name in ``FORMATS``; None: compressed-tensors for a transformers model, else folded.
            kwargs: Passed on.
        """
        from lightning_quant.export import export

        if isinstance(module, LightningModule):
            module = find_part(module, self.module)  # type: ignore[assignment]
        return export(module, path, format=format, config=self.config, **kwargs)

    def _due(self, trainer: Trainer, step: int) -> tuple[bool, bool]:
        """Whether metrics, and whether each layer's, are logged after this optimizer step."""
        every = trainer.log_every_n_steps if self.log_every_n_steps is None else self.log_every_n_steps  # type: ignore[attr-defined]
        due, layers = (self._logs and n > 0 and (step + 1) % n == 0 for n in (every, self.log_layers_every_n_steps))
        return due, layers
