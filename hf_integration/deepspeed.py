"""What DeepSpeed asks of a Trainer with quantizers: groups, gathered checkpoints, a call before each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_quant.errors import explain
from lightning_quant.optim import param_groups
from lightning_quant.spec import QuantConfig


def gather_on_save(settings: dict[str, Any]) -> None:
    """Let ZeRO-3 write whole weights into a checkpoint unless the user says not to: only DeepSpeed reads parts.

    Args:
        settings: DeepSpeed's config; the setting is filled in where it is left open.
    """
    stage = settings.get("zero_optimization", {})
    if stage.get("stage") == 3:
        stage.setdefault("stage3_gather_16bit_weights_on_model_save", True)


def group_parameters(optimizer: Any, settings: Mapping[str, Any], model: nn.Module, config: QuantConfig) -> None:
    """Groups for an optimizer that DeepSpeed builds: accelerate's ``DummyOptim`` holds what goes into it.

    Args:
        optimizer: The ``DummyOptim``; its parameters become groups.
        settings: DeepSpeed's config, with the optimizer's numbers filled in.
        model: The model with quantizers.
        config: The config it was attached with.
    """
    numbers = settings["optimizer"].get("params", {})
    optimizer.params = param_groups(model, config, numbers.get("lr", 1e-3), numbers.get("weight_decay", 0.0))


def schedule_groups(settings: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Let a scheduler that DeepSpeed builds keep the groups' own rates, where it would give all of them one.

    Args:
        settings: DeepSpeed's config; its scheduler's rates become lists.
        groups: The optimizer's, of which the first has the rate of the run.

    Raises:
        ValueError: A scheduler that has one rate for all groups.
    """
    scheduler = settings.get("scheduler")
    factors = [group["lr"] / groups[0]["lr"] for group in groups if groups[0].get("lr")]
    if scheduler is None or all(factor == 1 for factor in factors):
        return
    kind, numbers = scheduler["type"], scheduler.setdefault("params", {})
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        cure = "Use WarmupLR, WarmupDecayLR, WarmupCosineLR, or leave the scheduler to the Trainer (lr_scheduler_type)."
        raise ValueError(explain("DeepSpeed's scheduler", "one that keeps groups' own learning rates", kind, cure))
    for name in ("warmup_min_lr", "warmup_max_lr"):
        if isinstance(numbers.get(name), (int, float)):
            numbers[name] = [numbers[name] * factor for factor in factors]


def before_steps(engine: Any, call: Callable[[], None]) -> None:
    """Call before each optimizer step of the engine.

    Accelerate steps it inside of ``backward``, so the Trainer's own event comes after the step.
    """
    step = engine.step

    def stepping(*args: Any, **kwargs: Any) -> Any:
        call()
        return step(*args, **kwargs)

    engine.step = stepping
