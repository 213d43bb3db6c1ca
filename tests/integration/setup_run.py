"""Set-up in two processes whose data differ: python setup_run.py --out DIR [--trainer] [--rounding]."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant import QuantCallback, QuantConfig
from lightning_quant.distributed import rank
from tests.integration.modules import Words
from tests.integration.processes import leave


class Stream(IterableDataset):
    """Without a length; every rank has another."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        draw = torch.Generator().manual_seed(rank())
        while True:
            yield (torch.randint(0, 24, (6,), generator=draw),)


class Keep(L.Callback):
    """Keeps the weights as training begins."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found = {k: v.clone() for k, v in pl_module.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trainer", action="store_true")
    parser.add_argument("--rounding", action="store_true")
    own = parser.parse_args()
    own.out.mkdir(parents=True, exist_ok=True)
    setup = ["smoothquant", {"name": "awq", "points": 4}]
    if own.rounding:
        setup += [{"name": "lapq", "evaluations": 8}, {"name": "adaround", "iterations": 10}]
    if own.trainer:
        from transformers import TrainerCallback, TrainingArguments, default_data_collator

        from hf_integration import QuantTrainer
        from tests.integration.tiny import causal_lm, token_rows

        class Begin(TrainerCallback):
            """As ``Keep``."""

            def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
                self.found = {k: v.clone() for k, v in trainer.model.state_dict().items()}

        begin = Begin()
        settings = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = TrainingArguments(str(own.out / "run"), max_steps=2, dataloader_pin_memory=False, **settings)
        config = QuantConfig.parse("ste", "w4a8-g32", setup=setup)
        rows = token_rows(32)
        trainer = QuantTrainer(
            model=causal_lm(), args=args, train_dataset=rows, data_collator=default_data_collator, quant=config
        )
        trainer.add_callback(begin)
        trainer.train()
        found, report = begin.found, trainer.quant_report
    else:
        torch.manual_seed(0)
        keep, module = Keep(), Words()
        quant = QuantCallback("ste", "w4a8-g16", setup=setup)
        strategy = DDPStrategy(process_group_backend="gloo")
        common = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_steps=2, callbacks=[quant, keep], **common
        )
        trainer.fit(module, DataLoader(Stream(), batch_size=4))
        found, report = keep.found, quant.report
        assert len(report.setup.applied) >= 4
    assert len(report.setup.chosen) == 2 * own.rounding
    torch.save(found, own.out / f"rank{rank()}.pt")


if __name__ == "__main__":
    main()
    leave()
