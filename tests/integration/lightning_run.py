"""A Lightning training that the tests start in processes of their own, kill, resume and compare.

python lightning_run.py --out DIR [--steps N] [--die-at STEP] [--resume] [--strategy auto|ddp|fsdp2] [--sharded]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_quant import QuantCallback
from lightning_quant.attach import quantizers
from lightning_quant.distributed import whole
from tests.integration.processes import leave


class Net(L.LightningModule):
    """A small transformer-ish block with linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 8)
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not hasattr(
            self.body[0], "set_reshard_after_forward"
        ):
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for layer in (self.body[0], self.body[2], self.head):
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        mean = loss.detach().clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        self.losses.append(float(mean))
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Die(L.Callback):
    """kill -9 in the middle of fitting."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Note(L.Callback):
    """What the quantizers hold when a run begins and after each epoch, by optimizer step."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ready = {f"{path}.ready": torch.tensor(q.ready) for path, q in quantizers(pl_module)}
        self.found[trainer.global_step] = quantizer_state(pl_module) | ready

    on_train_epoch_end = on_train_start


def quantizer_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Whole scales, Theta and observed ends of all quantizers."""
    return {
        f"{path}.{name}": whole(value.detach()).cpu().clone()
        for path, q in quantizers(module)
        for name, value in [*q.named_parameters(), *q.named_buffers()]
        if name in ("scale", "theta", "running")
    }


def data(world: int, rank: int) -> DataLoader:
    """Batches of 16 in all, in the same order whatever the number of processes."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 32, generator=g)
    y = (x[:, :8] + 0.1 * torch.randn(128, 8, generator=g)).argmax(1)
    rows = TensorDataset(x, y)
    sampler = DistributedSampler(rows, num_replicas=world, rank=rank, shuffle=False)
    return DataLoader(rows, batch_size=16 // world, sampler=sampler)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-from", type=Path, help="a checkpoint of another run")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--method", default="pege")
    parser.add_argument("--scheme", default="w4a16-g32")
    parser.add_argument("--calibration", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--compile", action="store_true", help="the quantizers' arithmetic in compiled kernels")
    parser.add_argument("--sharded", action="store_true", help="each process writes its part of a checkpoint")
    parser.add_argument("--metrics", action="store_true", help="every metric at every step, by rank 0 alone")
    args = parser.parse_args()
    if args.double:
        torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    strategy: object = "auto"
    if args.strategy == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    elif args.strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            process_group_backend="gloo",
            save_distributed_checkpoint=args.sharded,
        )

    quant = QuantCallback(
        args.method,
        args.scheme,
        calibration=args.calibration,
        delay=args.delay,
        log_every_n_steps=1,
        log_layers_every_n_steps=1,
        options={"compile": args.compile},
    )
    note = Note()
    save = ModelCheckpoint(args.out / "ckpt", filename="{epoch}", save_last=True, every_n_epochs=1, save_top_k=-1)
    callbacks: list[L.Callback] = [quant, note, save]
    if args.die_at:
        callbacks.append(Die(args.die_at))
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=callbacks,
        strategy=strategy,
        accelerator="cpu",
        devices=world,
        use_distributed_sampler=False,
        logger=CSVLogger(args.out) if args.metrics and rank == 0 else False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Net()
    path = args.out / "ckpt" / "last.ckpt" if args.resume else args.resume_from
    trainer.fit(model, data(world, rank), ckpt_path=path)

    state = {name: whole(value).cpu() for name, value in model.state_dict().items()}
    mine = quantizer_state(model)
    found = {"state": state, "quant": mine, "losses": model.losses, "noted": note.found}
    torch.save(found, args.out / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
    leave()
