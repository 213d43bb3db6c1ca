"""Small LightningModules, their data and a quiet Trainer for the integration tests."""

from __future__ import annotations

from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.attach import quantizers

# Every test module that fits with these says ``pytestmark = QUIET``.
QUIET = [
    # Lightning advises more DataLoader workers; the data here are a few rows in memory.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # The runs here are shorter than the default logging interval.
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    # Lightning 2.6 still builds its tree specs the way torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    # Not every fit here validates, though the modules can.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # Loading weights into a trainer without the ModelCheckpoint that wrote them is what is tested.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # Lightning notes that no logger is set where a module calls self.log.
    pytest.mark.filterwarnings("ignore:You called `self.log"),
]


class Cnn(L.LightningModule):
    """An ordinary image classifier: it knows nothing of quantization."""

    def __init__(self, width: int = 8, lr: float = 0.05, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, 4)
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


class Mlp(Cnn):
    """No batch norm: cutting a batch changes nothing."""

    def __init__(self, **kwargs: float) -> None:
        super().__init__(**kwargs)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Attention(nn.Module):
    """Self-attention whose inputs come by keyword, as in most transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, *, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.norm(hidden)
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), attn_mask=mask)
        hidden = hidden + self.out(mixed)
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


class Words(L.LightningModule):
    """A small transformer called with keyword arguments throughout."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(24, 16)
        self.blocks = nn.ModuleList(Attention(16) for _ in range(2))
        self.head = nn.Linear(16, 24)
        self.losses: list[float] = []

    def forward(self, *, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            if self.recompute:
                hidden = checkpoint(block, hidden=hidden, mask=mask, use_reentrant=False)
            else:
                hidden = block(hidden=hidden, mask=mask)
        return self.head(hidden)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(tokens=batch[0]).flatten(0, 1), batch[0].flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def images(rows: int = 32, batch: int = 8, seed: int = 0) -> DataLoader:
    """Images whose brightest quarter is the label."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % 4
    x = 0.3 * torch.randn(rows, 1, 8, 8, generator=g)
    for i, k in enumerate(y.tolist()):
        x[i, 0, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 1
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def words(rows: int = 32) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randint(0, 24, (rows, 6), generator=g)), batch_size=8)


def trainer(root: Path, *callbacks: L.Callback, **settings: object) -> L.Trainer:
    defaults = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def learned(module: nn.Module) -> list[nn.Parameter]:
    return [p for _, q in quantizers(module) for p in q.parameters()]


def hard_output(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(x)
