"""QuantTrainerMixin: quantization-aware training inside ``transformers.Trainer`` and its subclasses."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.utils import DummyOptim
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_integration.arguments import QuantArguments
from hf_integration.deepspeed import before_steps, gather_on_save, group_parameters, schedule_groups
from hf_integration.teacher import load_teacher
from lightning_quant.adapters import float_paths
from lightning_quant.attach import is_attached, quantizers, without_quantizers
from lightning_quant.checkpoint import load_quant_config, load_quant_state, quantizers_aside, save_quant_state
from lightning_quant.controller import QuantController
from lightning_quant.errors import AttachError, CheckpointError, explain
from lightning_quant.report import Report
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.capture import first_call
from lightning_quant.transforms.pairs import Inputs
from lightning_quant.zero import gathered

if TYPE_CHECKING:
    from lightning_quant.export import ExportReport


class _Steps(TrainerCallback):
    """Passes the Trainer's events on to the controller."""

    def __init__(self, controller: QuantController, engine: Callable[[], Any]) -> None:
        self.controller, self.engine = controller, engine

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The run's length is known now, and not earlier."""
        self.controller.begin(state.max_steps if state.max_steps > 0 else None)
        if self.engine() is not None:
            before_steps(self.engine(), self.controller.before_optimizer_step)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update state no optimizer holds."""
        if self.engine() is None:
            self.controller.before_optimizer_step()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ranges, projections, coverage."""
        self.controller.after_optimizer_step()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Observers stay out of whatever the model is used for next."""
        self.controller.on_eval()


class QuantTrainerMixin:
    """Put in front of ``Trainer`` or a subclass: ``class MyQuantTrainer(QuantTrainerMixin, MyTrainer)``.

    Quantizers are attached before the optimizer exists; the training directory keeps the float model's
    keys, with ``quant_config.json`` and ``quant_state.safetensors`` beside them; evaluation always runs the
    hard low-bit model; nothing is converted when training ends unless ``quant_export`` asks for an export.

    ``quant_log_layers`` may be set after building: see ``QuantArguments``.

    Args:
        quant: ``QuantConfig``, ``QuantArguments`` or None (plain training).
        teacher: Model that ``QuantConfig.distill`` learns from; None: the one ``quant_teacher`` names, else the model
            itself in float.  The logged loss is the task's alone, ``quant_distill`` what the teacher adds.
        args: The base class's.
        kwargs: The base class's.
    """

    quant: QuantController | None = None
    quant_arguments: QuantArguments | None = None
    quant_exported = False
    quant_log_layers = 0
    _measured = -1
    _layers_logged = 0
    _curved = -1
    _has_data = False

    def __init__(
        self,
        *args: Any,
        quant: QuantConfig | QuantArguments | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self.init_quant(quant, teacher)
        super().__init__(*args, **kwargs)
        self.finish_init_quant()

    def create_accelerator_and_postprocess(self) -> None:
        """``Trainer.__init__``'s first call: attach to the model it was handed.

        Not earlier, since a subclass on the way there may put adapters around it (TRL's ``peft_config``) or copy it
        as a reference, and not later, since it is moved and looked at from here on.
        """
        if isinstance(self.model, nn.Module):
            self.attach_quant(self.model)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.quant is not None and self.is_deepspeed_enabled:
            gather_on_save(self._zero_settings())

    def init_quant(self, quant: QuantConfig | QuantArguments | None, teacher: nn.Module | None = None) -> None:
        """Check the settings; the first thing that happens."""
        if isinstance(quant, QuantArguments):
            self.quant_log_layers = quant.quant_log_layers
            self.quant_arguments, quant = quant, quant.to_config()
            if quant is not None and teacher is None and self.quant_arguments.quant_teacher is not None:
                teacher = load_teacher(self.quant_arguments.quant_teacher)
        self.quant = None if quant is None else QuantController(quant, teacher)

    def attach_quant(self, model: nn.Module) -> None:
        """Attach to the model this Trainer will train; what it saves by itself keeps the float model's keys."""
        if self.quant is None:
            return
        if self.quant.config.setup and not self._has_data:  # Trainer.__init__ has not yet taken the training data
            return
        self.quant.prepare(model, batches=self._setup_inputs, wait=True)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if isinstance(base, PreTrainedModel):
            names = float_paths(base)
            mine = {f"{names[path]}.{key}" for path, q in quantizers(base) for key in q.state_dict()}
            base._keys_to_ignore_on_save = {*(base._keys_to_ignore_on_save or ()), *mine}

    def finish_init_quant(self) -> None:
        """After the base class's ``__init__``: listen to its events."""
        if self.quant is None:
            return
        self._has_data = True
        if not is_attached(self.model):
            self.attach_quant(self.model)
        self._check_export()
        self.add_callback(_Steps(self.quant, lambda: self.deepspeed))
        if self.quant.report is not None and self.is_world_process_zero():
            print(self.quant.report, flush=True)

    def finish_quant_setup(self, loaded: bool = False) -> None:
        """Run what waits in ``QuantConfig.setup`` for quantizers; every rank calls it.

        Training, evaluation, saving and export do so first; not earlier, since only ``train`` is told of a checkpoint
        to resume from, which makes it needless.
        """
        if self.quant is not None and self.quant.finish_set_up(loaded) and self.is_world_process_zero():
            print(f"set-up: {self.quant.report.setup}", flush=True)  # type: ignore[union-attr]

    def _setup_inputs(self) -> list[Inputs]:
        """What the first training steps would call the model with; training's own random numbers are not used up."""
        config, found = self.quant.config, []  # type: ignore[union-attr]
        if self.train_dataset is None:
            cure = "Pass train_dataset, or run the transforms by hand and leave setup out."
            raise AttachError(explain("QuantConfig.setup", "training data to look at", "no train_dataset", cure))
        prepared = len(self.accelerator._dataloaders)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            loader = self.get_train_dataloader()
            for batch in loader:
                step = partial(self._loss_of, batch)
                found.append(first_call(self.model, step, f"{type(self).__name__}.compute_loss"))
                if len(found) == config.setup_batches:
                    break
        if isinstance(loader, DataLoaderStateMixin):
            loader.end()
        del self.accelerator._dataloaders[prepared:]
        return found

    def _loss_of(self, batch: Any) -> Any:
        return self.compute_loss(self.model, self._prepare_inputs(batch))

    def _check_export(self) -> None:
        """What cannot be exported when training ends is refused before it starts."""
        if self.quant_arguments is None or self.quant_arguments.quant_export is None:
            return
        from lightning_quant.export import check_export

        try:
            check_export(self._quant_model(None), self.quant_arguments.quant_format)
        except ValueError as error:
            raise AttachError(f"--quant_export: {error}") from error

    @property
    def quant_report(self) -> Report | None:
        """What was attached."""
        return None if self.quant is None else self.quant.report

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Attach to each model that ``model_init`` makes."""
        model: nn.Module = super().call_model_init(trial)  # type: ignore[misc]
        self.attach_quant(model)
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Quantizer parameters go into groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.quant is None:
            return optimizer
        if isinstance(self.optimizer, DummyOptim):
            group_parameters(self.optimizer, self._zero_settings(), self.model, self.quant.config)
        else:
            schedulers = [self.lr_scheduler] if isinstance(self.lr_scheduler, LRScheduler) else []
            self.quant.split_groups([self.optimizer], schedulers)
        if self.is_deepspeed_enabled:
            dummy = isinstance(self.optimizer, DummyOptim)
            schedule_groups(self._zero_settings(), self.optimizer.params if dummy else self.optimizer.param_groups)
        return optimizer

    def _zero_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.accelerator.state.deepspeed_plugin.deepspeed_config
        return settings

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Fill schedules, then train."""
        if self.quant is not None:
            step = self.state.global_step
            measure = self._logs_after(step + 1)
            self._measured = step + 1 if measure else self._measured
            alone = self.args.gradient_accumulation_steps == 1 == self.args.world_size
            self.quant.on_step(step, self._loss_scale(), measure, alone)
            if self.quant.starting:
                self._forget_best()
            if step != self._curved and self.quant.wants_curvature(step):
                self._curved = step
                self.quant.update_curvature(lambda: self._batch_loss(*args, **kwargs))
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def _forget_best(self) -> None:
        """Training leaves float: what was scored best until now is another model's.  Checkpoints stay on disk."""
        state = self.state
        if state.best_metric is not None and self.is_world_process_zero():
            what = f"{state.best_metric:g} of {state.best_model_checkpoint or 'no checkpoint'}"
            print(f"training is quantized from step {state.global_step} on; forgotten as best: {what}", flush=True)
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def _batch_loss(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The loss of a batch on the bare model: every rank its own."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return self.compute_loss(self.accelerator.unwrap_model(model), dict(inputs))

    def _logs_after(self, steps: int) -> bool:
        """Whether the training log gets an entry after this many optimizer steps."""
        if steps == 1 and self.args.logging_first_step:
            return True
        every = 0
        if self.args.logging_strategy == "steps":
            every = int(self.state.logging_steps or 0)
        elif self.args.logging_strategy == "epoch":
            try:
                every = math.ceil(len(self.callback_handler.train_dataloader) / self.args.gradient_accumulation_steps)
            except TypeError:  # a stream without a length
                return True
        return every > 0 and (
            steps % every == 0 or (self.args.logging_strategy == "epoch" and steps == self.state.max_steps)
        )

    def _loss_scale(self) -> float:
        """What the mean loss is multiplied with in each backward: gradient scaler over accumulation.

        Also when the Trainer normalises by the number of items: each micro-batch then contributes its
        share of the loss, while our term comes once per micro-batch.
        """
        scaler = getattr(self.accelerator, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        if self.deepspeed is not None:
            scale = float(getattr(self.deepspeed.optimizer, "cur_scale", 1.0))
        return scale / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the quantizers' metrics to the training log."""
        if self.quant is not None and "loss" in logs:
            fresh = self._measured == self.state.global_step
            values = self.quant.metrics(self._layers_due()) if fresh else self.quant.values()
            logs.update({f"quant_{name}": value for name, value in values.items()})
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _layers_due(self) -> bool:
        """Whether a multiple of ``quant_log_layers`` steps was reached since the last log of metrics."""
        every, last, now = self.quant_log_layers, self._layers_logged, self.state.global_step
        self._layers_logged = now
        return every > 0 and now // every != last // every

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Observers stay out of evaluation."""
        self.finish_quant_setup()
        if self.quant is not None:
            self.quant.on_eval()
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, and check coverage on the first."""
        out = super().prediction_step(*args, **kwargs)  # type: ignore[misc]
        if self.quant is not None:
            self.quant.after_eval_batch()
        return out

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """What is saved is what training starts from."""
        self.finish_quant_setup()
        super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights (of a model with adapters: those) under the float model's keys; quantizer state beside them."""
        if self.quant is None:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        model = self._quant_model(None)
        weights, mine = without_quantizers(model.state_dict() if state_dict is None else state_dict, model)
        if self.is_deepspeed_enabled:  # what comes gathered lacks frozen parameters
            with gathered(p for _, q in quantizers(model) for p in q.parameters()):
                mine = {k: v.clone() for k, v in without_quantizers(model.state_dict(), model)[1].items()}
        with self._float_keys():
            super()._save(output_dir, weights)  # type: ignore[misc]
        if self.args.should_save:
            save_quant_state(output_dir or self.args.output_dir, mine, self.quant.config)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Weights, then quantizer state; the config must be the one the run was started with."""
        self._check_config(resume_from_checkpoint)
        try:
            with self._float_keys(model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        except SafetensorError as error:
            raise CheckpointError(
                explain(resume_from_checkpoint, "whole weight files", str(error), "Take an earlier checkpoint.")
            ) from error
        if self.quant is not None:
            load_quant_state(self._quant_model(model), resume_from_checkpoint)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Set-up ends here unless a checkpoint was loaded; DeepSpeed loads its own later, which must be this run's."""
        resumed = kwargs.get("resume_from_checkpoint") is not None
        if self.is_deepspeed_enabled and resumed:
            self._check_config(kwargs["resume_from_checkpoint"])
        self.finish_quant_setup(loaded=resumed)
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def _check_config(self, checkpoint: str) -> None:
        if self.quant is not None:
            saved = load_quant_config(checkpoint)
            self.quant.load_state_dict({**self.quant.state_dict(), "config": saved.to_dict()})

    def _load_best_model(self) -> None:
        """Weights of the best checkpoint, then its quantizer state."""
        with self._float_keys():
            super()._load_best_model()  # type: ignore[misc]
        if self.quant is not None and not self.is_deepspeed_enabled:
            load_quant_state(self._quant_model(None), self.state.best_model_checkpoint)

    def _float_keys(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """While files are read and written, no quantizers; those of sharded models travel in the shards."""
        if self.quant is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return nullcontext()
        return quantizers_aside(self._quant_model(model))

    def _quant_model(self, model: nn.Module | None) -> nn.Module:
        unwrapped: nn.Module = self.accelerator.unwrap_model(model or self.model, keep_torch_compile=False)
        return unwrapped

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; then export if ``quant_export`` says where."""
        if self.quant_arguments is not None and self.quant_arguments.quant_export is not None:
            check_free(self.quant_arguments.quant_export)
        output = super().train(*args, **kwargs)  # type: ignore[misc]
        if self.quant is not None and self.quant_arguments is not None and self.quant_arguments.quant_export:
            self.export(self.quant_arguments.quant_export, format=self.quant_arguments.quant_format)
            self.quant_exported = True
        return output

    def export(self, path: str | Path, format: str | None = None, **kwargs: Any) -> ExportReport:
        """Write the low-bit model: see ``lightning_quant.export.export``.  Every rank calls it.

        Args:
            path: A directory that does not exist yet.
            format: A name in ``FORMATS``; None: compressed-tensors.
            kwargs: Passed on.
        """
        from lightning_quant.export import export

        if self.quant is None:
            raise ValueError(
                explain(
                    "QuantTrainer.export", "a quantized training", "quant=None", "Pass quant=QuantConfig.parse(...)."
                )
            )
        kwargs.setdefault("tokenizer", self.processing_class)
        self.finish_quant_setup()
        return export(self._quant_model(None), path, format=format, config=self.quant.config, **kwargs)


def check_free(path: str | Path) -> None:
    """Refuse an export directory that exists, before hours of training rather than after."""
    if Path(path).exists():
        raise FileExistsError(
            explain(
                str(path), "a directory that does not exist yet", "an existing one", "Choose another, or remove it."
            )
        )


class QuantTrainer(QuantTrainerMixin, Trainer):
    """``transformers.Trainer`` with ``quant=``."""
