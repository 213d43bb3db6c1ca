"""What QuantCallback knows of Lightning beyond its hooks: checkpoints, other callbacks, steps and loss scales."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_quant.attach import attach, quant_layers, quantizers
from lightning_quant.errors import AttachError, CheckpointError, explain
from lightning_quant.parts import find_part
from lightning_quant.spec import QuantConfig
from lightning_quant.transforms.capture import CURE, first_call
from lightning_quant.transforms.pairs import Inputs
from lightning_quant.transforms.setup import restructure

Module = TypeVar("Module", bound=LightningModule)


def run_length(trainer: Trainer, module: LightningModule) -> int | None:
    """Optimizer steps (with manual optimization batches) of the whole run; None for one without an end."""
    steps = trainer.estimated_stepping_batches
    if not module.automatic_optimization and trainer.max_steps > 0:
        steps = min(steps, math.ceil(trainer.max_steps / max(len(trainer.optimizers), 1)))
    return int(steps) if steps != float("inf") and steps >= 0 else None


def optimizer_steps(trainer: Trainer, module: LightningModule) -> int:
    """Optimizer steps done; with manual optimization batches, for ``global_step`` adds all optimizers' up."""
    if module.automatic_optimization:
        return int(trainer.global_step)
    return int(trainer.fit_loop.epoch_loop.total_batch_idx)


def batch_loss(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """The loss of a batch by one more call of ``training_step``, with nothing logged."""
    with _nothing_logged(module), trainer.precision_plugin.forward_context():
        out: Any = module.training_step(batch, batch_idx)
    return out["loss"] if isinstance(out, Mapping) else out


@contextmanager
def _nothing_logged(module: LightningModule) -> Iterator[None]:
    module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del module.__dict__["log"]


def training_inputs(trainer: Trainer, module: LightningModule, part: nn.Module, config: QuantConfig) -> list[Inputs]:
    """What the first training steps would call a part with; training's own random numbers are not used up.

    The loaders are those of the run, before Lightning splits them over ranks.

    Args:
        trainer: In ``setup`` of fit.
        module: Its module.
        part: What is quantized.
        config: How many batches, and the seed of their order.

    Raises:
        AttachError: There is no data yet, or a training step does not reach the part.
    """
    source, found = trainer.fit_loop._data_source, []
    with torch.random.fork_rng(), _nothing_logged(module):
        torch.manual_seed(config.seed)
        try:
            loaders = source.dataloader()
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            cure = "Make the data in __init__ or in a LightningDataModule, or pass loaders to fit. " + CURE
            raise AttachError(explain("QuantConfig.setup", "training data before setup", got, cure)) from error
        loader = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
        device = next((p.device for p in part.parameters()), torch.device("cpu"))
        for batch, index, _ in iter(loader):
            moved = trainer.strategy.batch_to_device(batch, device, 0)
            step = partial(module.training_step, moved, index)
            found.append(first_call(part, step, f"{type(module).__name__}.training_step"))
            if len(found) == config.setup_batches:
                break
    return found


def loss_scale(trainer: Trainer, module: LightningModule) -> float:
    """What Lightning multiplies a loss with before backward: the gradient scaler over accumulation."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / trainer.accumulate_grad_batches if module.automatic_optimization else scale


def is_alone(trainer: Trainer, module: LightningModule) -> bool:
    """Whether an update takes the gradient of one backward of one process."""
    return module.automatic_optimization and trainer.accumulate_grad_batches == 1 == trainer.world_size


def refuse_float_copies(trainer: Trainer, module: LightningModule) -> None:
    """Complain about a weight-averaging callback that copied the module before its quantizers were attached."""
    wanted = sum(1 for _ in quantizers(module))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        copy = getattr(callback, "_average_model", None)
        if copy is not None and sum(1 for _ in quantizers(copy)) != wanted:
            raise ValueError(
                explain(
                    type(callback).__name__,
                    "to copy the module after QuantCallback attached its quantizers",
                    "a copy in float",
                    "Put QuantCallback before it in Trainer(callbacks=[...]).",
                )
            )


def forget_best(trainer: Trainer) -> None:
    """Let checkpoint and early-stopping callbacks start over: what the float phase scored is another model's.

    Files that were written stay, and so does ``last``.
    """
    forgotten = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, (ModelCheckpoint, EarlyStopping)) or callback.monitor is None:
            continue
        worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if isinstance(callback, EarlyStopping):
            best: Any = None if torch.isinf(callback.best_score) else callback.best_score
            callback.best_score, callback.wait_count = worst, 0
        else:
            best = callback.best_model_score
            callback.best_model_score = callback.current_score = None
            callback.best_k_models, callback.kth_value = {}, worst
            callback.best_model_path = callback.kth_best_model_path = ""
        if best is not None:
            forgotten.append(f"{float(best):g} of {type(callback).__name__}({callback.monitor!r})")
    if forgotten:
        rank_zero_info(f"QuantCallback: training is quantized from now on; forgotten as best: {', '.join(forgotten)}")


def refuse_float_checkpoints(part: nn.Module, name: str) -> RemovableHandle:
    """Watch what is loaded into a part with quantizers: weights without their ranges are a float run's.

    Args:
        part: The part.
        name: Class of the LightningModule it belongs to, for the message.

    Returns:
        Ends it.
    """
    watch = partial(_refuse_float_state, name=name)
    handle: RemovableHandle = part.register_load_state_dict_pre_hook(watch)  # type: ignore[no-untyped-call]
    return handle


def _refuse_float_state(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any, name: str) -> None:
    mine = tuple(f"{prefix}{path}." for path, q in quantizers(module) if q.state_dict())
    weights = any(f"{prefix}{layer.weight_name(path)}" in state for path, layer in quant_layers(module))
    if mine and weights and not any(key.startswith(mine) for key in state):
        raise CheckpointError(
            explain(
                "ckpt_path",
                "the checkpoint of a run with QuantCallback",
                f"the weights of a float run, without the state of {len(mine)} quantizers",
                f"Load them first, model = {name}.load_from_checkpoint(path), and leave ckpt_path out.",
            )
        )


def load_quantized(kind: type[Module], path: str | Path, key: str, map_location: Any = None, **hparams: Any) -> Module:
    """A module and its quantizers as a checkpoint holds them; see ``QuantCallback.load_from_checkpoint``.

    Args:
        kind: Class of the module.
        path: The checkpoint.
        key: What ``state_key`` of the callbacks begins with.
        map_location: As in ``torch.load``.
        hparams: Arguments of the class, over the saved ones.

    Raises:
        CheckpointError: No callback of that key was part of the run.
    """
    saved = torch.load(path, map_location=map_location, weights_only=True)
    states = saved.get("callbacks") or {}
    mine = [states[name] for name in states if name == key or name.startswith(key + "{")]
    if not mine:
        expected, got = f"a checkpoint of a run with {key}", f"one with the callbacks {sorted(states)}"
        cure = f"A float run's is loaded by {kind.__name__}.load_from_checkpoint(path)."
        raise CheckpointError(explain(str(path), expected, got, cure))
    with warnings.catch_warnings():  # of the quantizers' keys, which are loaded below
        warnings.filterwarnings("ignore", "Found keys that are not in the model state dict")
        module = kind.load_from_checkpoint(path, map_location=map_location, strict=False, weights_only=True, **hparams)
    for state in mine:
        part, config = find_part(module, state.get("module")), QuantConfig.from_dict(state["config"], str(path))
        restructure(part, config)
        attach(part, config)
    module.load_state_dict(saved["state_dict"], strict=module.strict_loading)
    return module.eval()
