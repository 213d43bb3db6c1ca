"""A rounding at set-up under FSDP2 in two processes, then a resumed run: python setup_sharded_run.py --out DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_quant import QuantCallback
from lightning_quant.distributed import rank, whole
from tests.integration.modules import Words, words
from tests.integration.processes import leave


class Sharded(Words):
    """Notes its whole weights as training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.begin: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in self.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def on_train_start(self) -> None:
        self.begin = gathered(self)


def gathered(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: whole(t.detach()).clone() for name, t in module.state_dict().items()}


def fit(epochs: int, keep: Path, resume: Path | None = None) -> Sharded:
    torch.manual_seed(0)
    module = Sharded()
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        max_epochs=epochs,
        callbacks=[
            QuantCallback("ste", "w3a8-g16", setup=["smoothquant", "gptq"]),
            ModelCheckpoint(keep, save_last=True),
        ],
        **settings,
    )
    trainer.fit(module, words(), ckpt_path=resume)
    return module


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    own = parser.parse_args()
    whole_run = fit(2, own.out / "whole")
    fit(1, own.out / "half")
    resumed = fit(2, own.out / "again", own.out / "half" / "last.ckpt")
    found = {"begin": whole_run.begin, "end": gathered(whole_run), "resumed": gathered(resumed)}
    torch.save(found, own.out / f"rank{rank()}.pt")


if __name__ == "__main__":
    main()
    leave()
