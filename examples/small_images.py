"""Small colour images as a LightningDataModule: CIFAR-10 from parquet files, or scikit-learn's digits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L  # noqa: N812
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset, default_collate


class Images(L.LightningDataModule):
    """CIFAR-10 from parquet files, or scikit-learn's digits as small colour images.

    Args:
        data: Directory with train*.parquet and test*.parquet; None: digits.
        batch_size: Images per training batch.
        limit: Use at most as many images of each split; None: all.
    """

    def __init__(self, data: str | None = None, batch_size: int = 128, limit: int | None = None) -> None:
        super().__init__()
        self.data, self.batch_size, self.limit = data, batch_size, limit
        self.splits: list[TensorDataset] = []

    def setup(self, stage: str) -> None:
        if not self.splits:
            found = digits(self.limit) if self.data is None else cifar(self.data, self.limit)
            self.splits = [TensorDataset(*split) for split in found]

    def train_dataloader(self) -> DataLoader:
        rows = self.splits[0]
        collate = partial(batch, mirror=self.data is not None, shift=rows[0][0].shape[-1] // 8)
        return DataLoader(rows, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.splits[1], 500, collate_fn=batch)


def digits(limit: int | None) -> list[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.images * 15, dtype=torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return [(x[rows], torch.tensor(found.target)[rows]) for rows in (order[:1400][:limit], order[1400:][:limit])]


def cifar(data: str, limit: int | None) -> list[tuple[Tensor, Tensor]]:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    files = {split: str(Path(data) / f"{split}*.parquet") for split in ("train", "test")}
    splits = load_dataset("parquet", data_files=files)
    out = []
    for rows in (splits["train"], splits["test"]):
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        x = np.stack([np.asarray(image) for image in rows["image"]])
        out.append((torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(list(rows["label"]))))
    return out


def batch(rows: list[tuple[Tensor, Tensor]], mirror: bool = False, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Images in about [-2, 2], each mirrored half of the time and moved by up to ``shift`` pixels."""
    x, y = default_collate(rows)
    n, side = len(x), x.shape[-1]
    x = (x.float() - 127.5) / 64
    if mirror:
        x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(-1), x)
    windows = F.pad(x, [shift] * 4).unfold(2, side, 1).unfold(3, side, 1)
    top, left = torch.randint(2 * shift + 1, (2, n))
    return windows[torch.arange(n), :, top, left], y
