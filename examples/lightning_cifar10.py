"""Quantization-aware training of ResNet-20 on CIFAR-10 with PyTorch Lightning.

    python examples/lightning_cifar10.py --data DIR --epochs 30 --scheme w4a4 --out out

``DIR`` holds CIFAR-10 as parquet (train*.parquet and test*.parquet, columns image and label).  Without it the
network learns scikit-learn's digits, in about a minute.  Trains in float, then goes on from the float weights with
``QuantCallback``, and compares with rounding the float network without training.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from itertools import islice
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from small_images import Images
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_quant import QuantCallback, QuantConfig, attach, calibrate


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            shrink = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shrink, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(L.LightningModule):
    """ResNet-20 for small images (He et al. 2016, 1512.03385, section 4.2); knows nothing of quantization.

    Args:
        width: Channels of the first stage; 16 in the paper.
        lr: Peak learning rate of a one-cycle schedule.
        weights: A Lightning checkpoint to start from; None: random weights.
    """

    def __init__(self, width: int = 16, lr: float = 0.1, weights: str | None = None) -> None:
        super().__init__()
        self.lr = lr
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = [Block(width, width, 1) for _ in range(3)]
        for inputs in (width, 2 * width):
            blocks += [Block(inputs, 2 * inputs, 2), *(Block(2 * inputs, 2 * inputs, 1) for _ in range(2))]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
        if weights is not None:
            self.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(x))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="directory of CIFAR-10's parquet files; default: digits")
    parser.add_argument("--method", default="pege")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--epochs", type=int, default=6, help="in float, and again with quantization")
    parser.add_argument("--max_steps", type=int, default=-1, help="stop each training after as many steps")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--limit", type=int, help="use at most as many images of each split")
    parser.add_argument("--out", type=Path, help="where the export goes")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning.*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    data = Images(args.data, args.batch_size, args.limit)

    def trainer(*callbacks: L.Callback) -> L.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        return L.Trainer(
            max_epochs=args.epochs, max_steps=args.max_steps, callbacks=list(callbacks), devices=1, **quiet
        )

    def accuracy(model: ResNet) -> float:
        return trainer().test(model, data, verbose=False)[0]["test_accuracy"]

    model = ResNet(args.width)
    trainer().fit(model, data)
    results = {"float": accuracy(model)}
    rounded = copy.deepcopy(model)
    attach(rounded, QuantConfig.parse("ste", args.scheme))
    calibrate(rounded, (x for x, _ in islice(data.train_dataloader(), 20)))
    results[f"{args.scheme} rounded"] = accuracy(rounded)
    model.lr /= 10
    quant = QuantCallback(args.method, args.scheme)
    trainer(quant).fit(model, data)
    results[f"{args.scheme} {args.method}"] = accuracy(model)
    for name, value in results.items():
        print(f"{name:<16} {value:.4f}")
    if args.out is not None:
        print(quant.export(model, args.out))


if __name__ == "__main__":
    main()
