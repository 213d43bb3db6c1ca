"""Small convolution networks of the usual shapes: CIFAR's ResNet-20 and MobileNetV2, unaware of quantization."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Basic(nn.Module):
    """Two convolutions and a shortcut; one ReLU module serves both places, as in many repositories."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet20(nn.Module):
    """Three stages of ``depth`` blocks with width, 2 width and 4 width channels."""

    def __init__(self, width: int = 8, depth: int = 3, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, last = [], width
        for i, out in enumerate((width, 2 * width, 4 * width)):
            for j in range(depth):
                blocks.append(Basic(last, out, 2 if i > 0 and j == 0 else 1))
                last = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(torch.flatten(self.pool(self.blocks(x)), 1))


class Inverted(nn.Module):
    """Widen, depthwise, narrow; a shortcut where shapes allow."""

    def __init__(self, width: int, out: int, stride: int, widen: int) -> None:
        super().__init__()
        inner = width * widen
        self.shortcut = stride == 1 and width == out
        self.conv = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, a 1x1 convolution, a mean written as a function."""

    def __init__(self, width: int = 8, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        body = [Inverted(width, width, 1, 2), Inverted(width, 2 * width, 2, 3), Inverted(2 * width, 2 * width, 1, 3)]
        last = [nn.Conv2d(2 * width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU6()]
        self.features = nn.Sequential(*stem, *body, *last)
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(4 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


def digits(size: int = 8) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as (1797, 1, size, size) images in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return nn.functional.interpolate(images, size) if size != 8 else images, torch.tensor(y)


def train(net: nn.Module, steps: int, lr: float = 0.05, batch: int = 64, control: object | None = None) -> list[float]:
    """SGD on the digits; losses."""
    x, y = digits()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    losses = []
    net.train()
    for step in range(steps):
        rows = torch.randint(0, 1500, (batch,), generator=generator)
        if control is not None:
            control.on_step(step)
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if control is not None:
            control.after_optimizer_step()
        losses.append(float(loss.detach()))
    return losses
