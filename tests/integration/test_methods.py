"""Every method, on a CNN and on a small Llama, under both front ends: trains, resumes, exports or says why not."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments, default_data_collator

from hf_integration import QuantTrainer
from lightning_quant import ESTIMATORS, QuantCallback, QuantConfig, attach
from lightning_quant.attach import quantizers
from lightning_quant.errors import AttachError
from lightning_quant.export import export, verify
from tests.integration.processes import differing
from tests.integration.tiny import causal_lm, token_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # The resumed run writes elsewhere.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]

STEPS, SAVED = 12, 6


class Digits(nn.Module):
    """An image classifier in the form transformers' Trainer takes; values of both signs, which binary methods need."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardtanh()),
            *(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.Hardtanh()),
            *(nn.Flatten(), nn.Linear(256, 32), nn.BatchNorm1d(32), nn.Hardtanh(), nn.Linear(32, 10)),
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


def digits_rows(count: int) -> list[dict[str, torch.Tensor]]:
    digits = load_digits()
    x = torch.tensor(digits.images[:count], dtype=torch.float32).unsqueeze(1) / 8 - 1
    return [{"pixel_values": x[i], "labels": torch.tensor(digits.target[i])} for i in range(count)]


NETS = {
    "cnn": (Digits, lambda: digits_rows(48)),
    "llama": (
        causal_lm,
        lambda: [{k: torch.tensor(v) for k, v in row.items()} for row in token_rows(48)],
    ),
}


class Lit(L.LightningModule):
    """Any of the nets."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(**batch)["loss"]
        return loss

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], batch: object, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def config_of(method: str, net: nn.Module) -> QuantConfig:
    """The method on the scheme it is made for; groups of 128 do not divide the rows of nets this small."""
    scheme = ESTIMATORS[method].about.scheme
    config = QuantConfig.parse(method, scheme, calibration=3)
    try:
        attach(copy.deepcopy(net), config)
    except AttachError:  # groups
        config = QuantConfig.parse(method, f"{scheme}-channel", calibration=3)
    return config


def lightning_run(net: nn.Module, rows: list, config: QuantConfig, out: Path, start: Path | None) -> tuple:
    module = Lit(net)
    trainer = L.Trainer(
        max_steps=STEPS,
        callbacks=[
            QuantCallback(config=config),
            ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(rows, batch_size=16, collate_fn=default_data_collator)
    trainer.fit(module, data, ckpt_path=str(start / f"step={SAVED}.ckpt") if start else None)
    return module.net, module.losses


def trainer_run(net: nn.Module, rows: list, config: QuantConfig, out: Path, start: Path | None) -> tuple:
    trainer = QuantTrainer(
        model=net,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            save_steps=SAVED,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=default_data_collator,
        quant=config,
    )
    trainer.train(resume_from_checkpoint=str(start / f"checkpoint-{SAVED}") if start else None)
    return net, [e["loss"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("front", [lightning_run, trainer_run], ids=["lightning", "transformers"])
@pytest.mark.parametrize("method", ESTIMATORS)
def test_trains_resumes_and_exports(tmp_path, method, front, name):
    make, rows = NETS[name]
    rows, config = rows(), config_of(method, make())
    net, losses = front(make(), rows, config, tmp_path / "whole", None)
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])  # epochs of three batches
    assert all(t.isfinite().all() for t in net.state_dict().values())

    again, rest = front(make(), rows, config, tmp_path / "resumed", tmp_path / "whole")
    assert rest[-(STEPS - SAVED) :] == losses[SAVED:]
    assert differing(net.state_dict(), again.state_dict()) == []
    assert all(q.ready for _, q in quantizers(net))

    net.eval()
    batch = default_data_collator(rows[:4])
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    formats = ["compressed-tensors", "folded"] if name == "llama" else ["folded"]
    written = []
    for format in formats:
        refused = None
        try:
            export(net, tmp_path / format, format=format, config=config)
        except ValueError as error:
            refused = str(error)
        if refused is not None:
            assert re.fullmatch(rf"\S+ \(format='{format}'\): expected .+, got .+\. .+\.", refused)
            assert not (tmp_path / format).exists()
            continue
        written.append(format)
        report = verify(tmp_path / format, net, inputs)
        assert report.ok, report
    print(f"{method} {ESTIMATORS[method].about.scheme} {name}: {written or 'no format holds it'}")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("front", [lightning_run, trainer_run], ids=["lightning", "transformers"])
def test_ewgs_follows_the_hessian(tmp_path, front, name):
    make, rows = NETS[name]
    scheme = "w4a4-static-channel" if name == "cnn" else "w4a16-channel"
    options = {"delta": "hessian", "period": 0.25, "probes": 2, "calibration": 2}
    config = QuantConfig.parse("ewgs", scheme, **options)
    net, losses = front(make(), rows(), config, tmp_path / "whole", None)
    deltas = [q.delta.item() for _, q in quantizers(net)]
    assert all(math.isfinite(d) for d in deltas)
    assert any(d > 0 for d in deltas)
    again, rest = front(make(), rows(), config, tmp_path / "resumed", tmp_path / "whole")
    assert rest[-(STEPS - SAVED) :] == losses[SAVED:]
    assert differing(net.state_dict(), again.state_dict()) == []


def test_ewgs_by_the_hessian_refuses_manual_optimization(tmp_path):
    class Manual(Lit):
        automatic_optimization = False

    callback = QuantCallback("ewgs", "w4a16-channel", options={"delta": "hessian"})
    trainer = L.Trainer(max_steps=2, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"ewgs.delta='hessian': expected automatic optimization"):
        trainer.fit(Manual(Digits()), DataLoader(digits_rows(16), batch_size=16, collate_fn=default_data_collator))
