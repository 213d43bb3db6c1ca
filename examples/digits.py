"""Quantization-aware training of a small CNN on scikit-learn's digits with PyTorch Lightning.

    python examples/digits.py --scheme w8a8 --scheme w2a2 --out out

Trains in float, then goes on from the float weights three ways: not at all (rounding only), in float for as
many epochs (the control), and with ``QuantCallback``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import QuantCallback, QuantConfig, attach, calibrate


class DigitsCNN(L.LightningModule):
    """Three convolutions and a linear layer; knows nothing of quantization."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=1e-4)


def data(seed: int) -> tuple[DataLoader, DataLoader]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1400], order[1400:]
    shuffle = torch.Generator().manual_seed(seed)
    return (
        DataLoader(TensorDataset(x[train], y[train]), batch_size=64, shuffle=True, generator=shuffle),
        DataLoader(TensorDataset(x[held_out], y[held_out]), batch_size=397),
    )


def trainer(epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="auto", devices=1, enable_progress_bar=False, **quiet
    )


def accuracy(model: DigitsCNN) -> float:
    return trainer(1, []).validate(model, data(0)[1], verbose=False)[0]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="pege")
    parser.add_argument("--scheme", action="append", help="may be repeated; default w8a8 and w2a2")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="where results.json and the exports go")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    L.seed_everything(args.seed)

    born = DigitsCNN(lr=3e-3)
    trainer(args.epochs, []).fit(born, data(args.seed)[0])
    born.lr = 1e-3
    control = copy.deepcopy(born)
    trainer(args.epochs, []).fit(control, data(args.seed + 1)[0])
    results = {"float": accuracy(born), "control": accuracy(control)}
    for scheme in args.scheme or ["w8a8", "w2a2"]:
        rounded = copy.deepcopy(control)
        attach(rounded, QuantConfig.parse("ste", scheme))
        calibrate(rounded, [batch[0] for batch in data(args.seed)[0]])
        results[f"{scheme} rounded"] = accuracy(rounded)

        tuned, quant = copy.deepcopy(born), QuantCallback(args.method, scheme)
        trainer(args.epochs, [quant]).fit(tuned, data(args.seed + 1)[0])
        results[f"{scheme} {args.method}"] = accuracy(tuned)
        if args.out is not None:
            print(quant.export(tuned, args.out / scheme))
    for name, value in results.items():
        print(f"{name:<16} {value:.4f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
