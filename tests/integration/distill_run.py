"""A distilled Lightning training that the tests start on one process or on two, and compare.

python distill_run.py --out DIR [--strategy auto|ddp|fsdp2]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_quant import QuantCallback
from lightning_quant.distributed import whole
from tests.integration.lightning_run import Net, data, quantizer_state
from tests.integration.processes import leave


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", default="auto")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    strategy: object = "auto"
    if args.strategy == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    elif args.strategy == "fsdp2":
        strategy = ModelParallelStrategy(world, 1, process_group_backend="gloo")
    quant = QuantCallback("lsq", "w2a16-g32", distill={"weight": 2.0, "temperature": 2.0}, log_every_n_steps=1)
    model = Net()
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[quant],
        strategy=strategy,
        accelerator="cpu",
        devices=world,
        use_distributed_sampler=False,
        logger=CSVLogger(args.out) if rank == 0 else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data(world, rank))
    state = {name: whole(value).cpu() for name, value in model.state_dict().items()}
    found = {"state": state, "quant": quantizer_state(model), "losses": model.losses}
    torch.save(found, args.out / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
    leave()
