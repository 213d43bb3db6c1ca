"""One small training for each combination of what a Lightning Trainer offers; the tests compare what comes out.

python matrix_run.py --out DIR --strategy ddp|fsdp2|fsdp1|cuda_fsdp1|cuda_deepspeed

Under torchrun one group of processes goes through all combinations of a strategy.
"""

from __future__ import annotations

import argparse
import os
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_quant import QuantCallback, attach
from lightning_quant.attach import quantizers
from lightning_quant.distributed import whole
from tests.integration.processes import leave

BATCH, ROWS = 16, 32


class Case(NamedTuple):
    """One combination.

    ``compiled`` says where torch.compile comes: nowhere, around an ``inner`` part in the constructor, around the
    module given to fit (``before`` quantizers), or ``after`` quantizers were attached by hand.
    """

    precision: str = "32-true"
    accumulate: int = 1
    recompute: bool = False
    compiled: str = ""

    def __str__(self) -> str:
        words = [self.precision, f"accumulate{self.accumulate}", "recompute" if self.recompute else "", self.compiled]
        return "-".join(filter(None, words))


class WrappedByHand(FSDPStrategy):
    """FSDP1 on CPUs, which Lightning does not offer: the module wraps its layers in ``configure_model``."""


class Net(L.LightningModule):
    """A convolution and two linear layers, one of them rerun in the backward pass on request."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.first: nn.Module = nn.Conv2d(1, 8, 3, padding=1)
        self.middle: nn.Module = nn.Sequential(nn.Linear(128, 32), nn.Tanh())
        self.head: nn.Module = nn.Linear(32, 4)
        if case.compiled == "inner":
            self.middle = torch.compile(self.middle, backend="aot_eager")
        self.losses: list[float] = []
        self.reached: list[bool] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not hasattr(self, "unshard"):
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for part in (self.first, self.middle, self.head):
                fully_shard(part, mesh=mesh)
            fully_shard(self, mesh=mesh)
        elif isinstance(self.trainer.strategy, WrappedByHand):
            from torch.distributed.fsdp import FullyShardedDataParallel

            for name in ("first", "middle", "head"):
                part = FullyShardedDataParallel(
                    getattr(self, name), use_orig_params=True, device_id=torch.device("cpu")
                )
                setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.first(x).tanh(), 4).flatten(1)
        x = checkpoint(self.middle, x, use_reentrant=False) if self.case.recompute else self.middle(x)
        return self.head(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        for _, q in quantizers(self):
            q.called = False

    def on_after_backward(self) -> None:
        self.reached.append(all(q.called for _, q in quantizers(self)))

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], batch: object, batch_idx: int) -> None:
        loss = outputs["loss"].double() * self.case.accumulate  # Lightning divided by it
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        self.losses.append(float(loss))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(batch: int, world: int = 1, rank: int = 0) -> DataLoader:
    """Images whose brightest quarter is the label, the same rows in a batch however many processes share it."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(ROWS) % 4
    x = 0.3 * torch.randn(ROWS, 1, 8, 8, generator=g)
    for i, k in enumerate(y.tolist()):
        x[i, 0, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1
    rows = TensorDataset(x, y)
    sampler = DistributedSampler(rows, num_replicas=world, rank=rank, shuffle=False)
    return DataLoader(rows, batch_size=batch // world, sampler=sampler)


def train(case: Case, quant: QuantCallback | None = None, scale: float = 1024, **settings: Any) -> dict[str, Any]:
    """Losses (means over all rows), whether every quantizer was always called, and the state at the end.

    Args:
        case: The combination.
        quant: The callback; None: pege with every phase of it.
        scale: What a gradient scaler starts with.
        settings: Other arguments for the Trainer.
    """
    torch._dynamo.reset()
    counters.clear()
    # In float64 a sum in another order moves no value to another code, so whole runs can be compared.  Not every
    # strategy has Lightning's own 64-true.
    usual, double = torch.get_default_dtype(), case.precision == "64-true"
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    module = Net(case)
    if quant is None:
        quant = QuantCallback("pege", "w4a8", options={"calibration": 1, "lam": {"curve": "cosine", "end": 0.05}})
    if case.compiled == "after":
        attach(module, quant.config)
        module.compile(backend="aot_eager")
    precision: dict[str, Any] = {"precision": "32-true" if double else case.precision}
    if case.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        precision = {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}
    defaults = {
        "max_epochs": 4,
        "accumulate_grad_batches": case.accumulate,
        "callbacks": [quant],
        "accelerator": "cpu",
        "devices": world,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{**defaults, **precision, **settings})
    given = torch.compile(module, backend="aot_eager") if case.compiled == "before" else module
    trainer.fit(given, data(BATCH // case.accumulate, world, rank))
    torch.set_default_dtype(usual)
    state = {name.replace("_orig_mod.", ""): whole(value).clone() for name, value in module.state_dict().items()}
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    last = scale if scaler is None else scaler.get_scale()
    graphs = counters["stats"]["unique_graphs"]
    return {"losses": module.losses, "reached": module.reached, "state": state, "scale": last, "graphs": graphs}


def cases(strategy: str) -> list[Case]:
    """What runs on several processes: everything eager, and one way to compile."""
    if strategy.startswith("cuda"):
        return [Case("32-true"), Case("bf16-mixed", recompute=True)]
    full = "32-true" if strategy == "fsdp1" else "64-true"  # Lightning runs FSDP1 in float32 at most
    found = [Case(*c) for c in product((full, "bf16-mixed", "bf16-true"), (1, 2), (False, True))]
    if strategy == "fsdp1":
        return found
    if strategy == "fsdp2":  # Lightning shards neither under a gradient scaler nor what was compiled as a whole
        return [*found, Case("64-true", compiled="after")]
    return [*found, Case("16-mixed", 2), Case("64-true", compiled="before")]


def settings(strategy: str, world: int) -> dict[str, Any]:
    """The Trainer's arguments for a strategy; each combination needs new ones."""
    gloo = {"process_group_backend": "gloo"}
    if strategy == "ddp":
        return {"strategy": DDPStrategy(**gloo)}
    if strategy == "fsdp2":
        return {"strategy": ModelParallelStrategy(world, 1, **gloo)}
    if strategy == "fsdp1":
        return {"strategy": WrappedByHand(**gloo)}
    if strategy == "cuda_fsdp1":
        return {"strategy": FSDPStrategy(auto_wrap_policy={nn.Linear, nn.Conv2d}), "accelerator": "cuda"}
    # DeepSpeed's ZeRO has flattened its parameters before callbacks see the optimizer: nothing may be learned.
    config = {"strategy": DeepSpeedStrategy(stage=2), "accelerator": "cuda"}
    return {**config, "quant": QuantCallback("ste", "w4a8", options={"calibration": 1})}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = {str(case): train(case, **settings(args.strategy, world)) for case in cases(args.strategy)}
    torch.save(found, args.out / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
    leave()
