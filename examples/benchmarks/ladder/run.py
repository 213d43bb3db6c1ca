"""One run of the accuracy ladder: the float checkpoint, quantizers, training, and the hard low-bit model's figures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ladder.data import Data, Rows
from ladder.methods import CALIBRATION_ROWS
from ladder.store import FLOAT, Job, canonical
from ladder.tasks import TASKS, Task, forward, prepared
from lightning_quant import QuantConfig, QuantController, attach
from lightning_quant.attach import quant_layers
from lightning_quant.optim import param_groups
from lightning_quant.rounding import round_model
from lightning_quant.rounding.methods import ROUNDINGS

POINTS = 16  # of the curves that the first seed of every cell keeps
DECAY = {"adamw": 0.01, "sgd": 1e-4}
WARM_UP = 0.05
PRETRAIN_SEED = 0


class Start(NamedTuple):
    """What all runs of a task share."""

    task: Task
    data: Data
    weights: dict[str, Tensor]
    born: str  # the start of a hash of the weights: figures are paired only if theirs are the same


def prepare(name: str, data: Path | None, cache: Path, device: str = "cpu") -> Start:
    """A task's data and float checkpoint, made (on that device) if they are not in the cache."""
    task = TASKS[name]
    kept = cache / f"{name}-{hashlib.sha256(canonical(task.settings()).encode()).hexdigest()[:12]}.pt"
    if not kept.is_file():
        rows = task.read(task, data)
        torch.manual_seed(PRETRAIN_SEED)
        model = task.build(task, rows).to(device)
        job = Job(name, FLOAT, FLOAT, "{}", "adamw", task.pretrain_lr, task.pretrain, PRETRAIN_SEED)
        train(model, job, task, tuple(t.to(device) for t in rows.train), None)
        cache.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".tmp{os.getpid()}")
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        torch.save({"data": tuple(rows), "weights": weights}, temporary)
        temporary.replace(kept)
    held = torch.load(kept, weights_only=True)
    born = hashlib.sha256()
    for value in held["weights"].values():
        born.update(value.contiguous().numpy().tobytes())
    return Start(task, Data(*held["data"]), held["weights"], born.hexdigest()[:8])


def run(job: Job, start: Start, curves: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Figures of one run.

    Args:
        job: What is run.
        start: The task's data and float checkpoint.
        curves: Keep loss, lam, Theta and the like over time.
        device: Where it runs.

    Returns:
        ``held_loss``, ``held_accuracy``, ``test_loss``, ``test_accuracy`` of the hard low-bit model; ``step``: seconds
        of processor per optimizer step (on a GPU: of the clock); ``wall``: seconds in all; ``bytes``: of state per
        weight, optimizer included; ``born``; and the curves.
    """
    begin = time.perf_counter()
    task, rounding = start.task, job.method in ROUNDINGS
    data = Data(*(tuple(t.to(device) for t in part) for part in start.data))
    torch.manual_seed(job.seed)
    model = task.build(task, start.data)
    model.load_state_dict(start.weights)
    model.to(device)
    figures: dict[str, Any] = {"born": start.born}
    control = None
    if not (job.method == FLOAT or rounding):
        control = QuantController(config_of(job, task))
        control.prepare(model)
        control.begin(job.steps)
        figures["bytes"] = state_bytes(model)
    figures |= train(model, job, task, data.train, control, curves)
    if rounding:
        attach(model, QuantConfig.parse("ste", task.scheme(job.scheme)))
        rows = calibration(data.train[0], job.seed)
        round_model(model, None, rows, job.method, seed=job.seed, **json.loads(job.options))
    if control is not None:
        control.on_eval()
    for name, part in (("held", data.held_out), ("test", data.test)):
        figures[f"{name}_loss"], figures[f"{name}_accuracy"] = evaluate(task, model, part)
    figures["wall"] = time.perf_counter() - begin
    return figures


def config_of(job: Job, task: Task) -> QuantConfig:
    """What is quantized and how."""
    options = {"seed": job.seed, "calibration": max(1, min(16, job.steps // 8)), **json.loads(job.options)}
    if "a" in job.scheme:
        options.setdefault("first_last", task.first_last)
    return QuantConfig.parse(job.method, task.scheme(job.scheme), **options)


def batches(rows: Rows, size: int, steps: int, seed: int) -> Any:
    """So many batches, in an order that the seed decides, and the generator for what is drawn beside it."""
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(rows[0]), generator=draw).tolist()
        chosen, order = order[:size], order[size:]
        yield tuple(t[chosen] for t in rows), draw


def train(
    model: nn.Module, job: Job, task: Task, rows: Rows, control: QuantController | None, curves: bool = False
) -> dict[str, Any]:
    """Train for the job's steps: warm-up, then a cosine to 0; nothing else differs between methods.

    Returns:
        Seconds per step, and the curves if they are wanted.
    """
    if not job.steps:
        return {}
    groups = [{"params": list(model.parameters()), "weight_decay": DECAY[job.optimizer]}]
    if control is not None:
        groups = param_groups(model, control.config, job.lr, DECAY[job.optimizer])
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=job.lr)
        if job.optimizer == "adamw"
        else torch.optim.SGD(groups, lr=job.lr, momentum=0.9)
    )
    warm = max(1, round(WARM_UP * job.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, warm, job.steps))
    marks = {round(i * (job.steps - 1) / (POINTS - 1)) for i in range(POINTS)}
    kept: dict[str, list[float]] = {}
    losses: list[Tensor] = []
    clock = time.process_time if rows[0].device.type == "cpu" else time.perf_counter
    begin = clock()
    model.train()
    for step, (batch, draw) in enumerate(batches(rows, task.batch, job.steps, job.seed)):
        if control is not None:
            control.on_step(step)
        logits, target = forward(task, model, prepared(task, batch, draw))
        loss = F.cross_entropy(logits, target)
        loss.backward()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        if control is not None:
            control.before_optimizer_step(optimizer)
        optimizer.step()
        if control is not None:
            control.after_optimizer_step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step in marks:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            if not math.isfinite(mean):
                break  # a loss that is not a number stays one
            if curves:
                values = {"step": step, "loss": mean, **({} if control is None else shown(control))}
                for name, value in values.items():
                    kept.setdefault(name, []).append(float(f"{value:.4g}"))
    return {"step": (clock() - begin) / job.steps, **({"curves": kept} if curves else {})}


def shown(control: QuantController) -> dict[str, float]:
    """Scheduled and learned values that curves are kept of."""
    names = ("lam", "theta", "theta_max", "sharpness", "share", "alpha", "t", "frozen")
    return {name: value for name, value in control.metrics().items() if name in names}


def factor(step: int, warm: int, steps: int) -> float:
    """Of the learning rate."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, rows: Rows) -> tuple[float, float]:
    """Mean loss and accuracy over all predictions."""
    model.eval()
    loss = right = count = 0.0
    for part in zip(*(t.split(250) for t in rows), strict=True):
        logits, target = forward(task, model, prepared(task, part))
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
        right += float((logits.argmax(1) == target).sum())
        count += len(target)
    return (loss / count, right / count) if math.isfinite(loss) else (math.inf, 0.0)


def calibration(ids: Tensor, seed: int) -> list[dict[str, Tensor]]:
    """Rows of the training text, two in a batch, with labels."""
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_ROWS]
    return [{"input_ids": pair, "labels": pair} for pair in ids[chosen].split(2)]


def state_bytes(model: nn.Module) -> float:
    """Bytes per weight of what the weights' quantizers keep in training, with AdamW's gradient and moments."""
    held = weights = 0
    for _, layer in quant_layers(model):
        own = dict(layer.weight_quant.named_parameters())
        held += sum(p.numel() * p.element_size() * 3 for p in own.values())
        held += sum(t.numel() * t.element_size() for t in layer.weight_quant.state_dict().values())
        weights += layer.weight.numel()
    return held / weights
