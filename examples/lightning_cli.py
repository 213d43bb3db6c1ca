"""The network and the data of lightning_cifar10.py under LightningCLI: see lightning_cli.yaml."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI
from lightning_cifar10 import ResNet
from small_images import Images


def main() -> None:
    LightningCLI(ResNet, Images, seed_everything_default=0)


if __name__ == "__main__":
    main()
