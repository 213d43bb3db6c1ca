"""The tasks of the accuracy ladder: a model, its data in three parts, and the float training they share.

``train`` is what models learn from, ``held_out`` is what learning rates are chosen on, ``test`` is what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ladder.data import (
    Data,
    Rows,
    bert,
    cifar_data,
    cnn,
    digits_data,
    language_data,
    llama,
    passages_data,
    resnet,
    scattered_data,
)

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Task:
    """One rung of the ladder.

    Args:
        name: As on the command line.
        kind: What a row is: ``images`` and ``passages`` have a class, ``language`` is text.
        counts: What is compared: ``accuracy`` (more is better) or ``loss`` (less is better).
        about: What it is, for the table.
        read: Makes the data from the task and the ``--data`` directory.
        build: Makes the model with random weights, from the task and the data.
        files: Needed below ``--data``.
        rows: How many rows each part has.
        sizes: Of the model and of its inputs.
        batch: Rows per step.
        pretrain: Steps of the float training that all runs start from; the training budget that ``--budgets`` shares.
        pretrain_lr: Its peak learning rate, with AdamW.
        steps: Of each run that fine-tunes.
        rates: Learning rates that the sweep begins with, by optimizer; neighbours in ``RATES``.
        group: What the scheme gets for its weights.
        first_last: ``QuantConfig.first_last`` where activations are quantized too.
        clip: Norm that gradients are clipped to; None: not.
        augment: Mirror images and move them by up to an eighth of their side.
    """

    name: str
    kind: str
    counts: str
    about: str
    read: Callable[[Task, Path | None], Data]
    build: Callable[[Task, Data], nn.Module]
    rows: tuple[int, int, int]
    batch: int
    pretrain: int
    pretrain_lr: float
    steps: int
    rates: dict[str, tuple[float, ...]]
    files: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    group: str = ""
    first_last: str = "inherit"
    clip: float | None = None
    augment: bool = False

    def settings(self) -> dict[str, Any]:
        """All that decides the float model and what it is measured on."""
        names = ("name", "kind", "rows", "sizes", "batch", "pretrain", "pretrain_lr", "clip", "augment")
        known = asdict(self)
        return {name: known[name] for name in names}

    def scheme(self, bits: str) -> str:
        """A scheme as ``QuantConfig.parse`` takes it: ``w2`` in groups of 32 is ``w2a16-g32``."""
        return (bits if "a" in bits else f"{bits}a16") + self.group

    def missing(self, data: Path | None) -> list[str]:
        """Files that are not there."""
        return [name for name in self.files if data is None or not (data / name).is_file()]


def forward(task: Task, model: nn.Module, batch: Rows) -> tuple[Tensor, Tensor]:
    """Logits of every prediction, (n, classes), and what is right, (n,)."""
    if task.kind == "images":
        return model(batch[0]), batch[1]
    if task.kind == "passages":
        return model(input_ids=batch[0]).logits, batch[1]
    logits = model(input_ids=batch[0], use_cache=False).logits[:, :-1]
    return logits.flatten(0, 1), batch[0][:, 1:].flatten()


def prepared(task: Task, rows: Rows, draw: torch.Generator | None = None) -> Rows:
    """Rows as the model takes them; with a generator and ``Task.augment``, images are mirrored and moved."""
    if task.kind != "images":
        return rows
    x, y = (rows[0].float() - 127.5) / 64, rows[1]
    if draw is None or not task.augment:
        return x, y
    n, side, shift = len(x), x.shape[-1], x.shape[-1] // 8
    flips = torch.rand(n, 1, 1, 1, generator=draw).to(x.device) < 0.5
    windows = F.pad(torch.where(flips, x.flip(-1), x), [shift] * 4).unfold(2, side, 1).unfold(3, side, 1)
    top, left = torch.randint(2 * shift + 1, (2, n), generator=draw)
    return windows[torch.arange(n), :, top, left], y


ADAMW, SGD = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LLAMA = {"vocab": 512, "tokens": 128, "hidden": 128, "layers": 4}
_LANGUAGE: dict[str, Any] = {
    "kind": "language",
    "counts": "loss",
    "read": language_data,
    "build": llama,
    "sizes": LLAMA,
    "batch": 8,
}
_LANGUAGE |= {"rates": {"adamw": ADAMW}, "group": "-g32", "clip": 1.0, "pretrain_lr": 2e-3}
_IMAGES: dict[str, Any] = {"kind": "images", "first_last": "w8a8", "rates": {"adamw": ADAMW, "sgd": SGD}}
_CIFAR: dict[str, Any] = {**_IMAGES, "counts": "accuracy", "read": cifar_data, "build": resnet, "augment": True}
_CIFAR |= {"files": ("cifar10/train.parquet", "cifar10/test.parquet"), "pretrain_lr": 5e-3}
TASKS = {
    task.name: task
    for task in (
        Task(
            **_IMAGES,
            name="digits",
            counts="loss",  # almost all images are right
            about="the CNN of examples/digits.py on scikit-learn's digits",
            read=digits_data,
            build=cnn,
            rows=(1000, 300, 497),
            batch=50,
            pretrain=600,
            pretrain_lr=3e-3,
            steps=300,
        ),
        Task(
            **_LANGUAGE,
            name="topics",
            about="a small Llama on the text of pydoc_data.topics",
            rows=(1050, 100, 200),
            pretrain=700,
            steps=150,
        ),
        Task(
            **{**_LANGUAGE, "read": scattered_data},
            name="shakespeare",
            about="the same Llama on tiny Shakespeare",
            files=("tinyshakespeare/input.txt",),
            rows=(3900, 200, 400),
            pretrain=3000,
            steps=600,
        ),
        Task(
            **_LANGUAGE,
            name="wikitext",
            about="the same Llama on WikiText-2 (trained on its validation part, tested on its test part)",
            files=("wikitext-2/valid.txt", "wikitext-2/test.txt"),
            rows=(3200, 150, 400),
            pretrain=1200,
            steps=200,
        ),
        Task(
            **_CIFAR,
            name="cifar",
            about="ResNet-8 on 20,000 images of CIFAR-10 (JPEG)",
            rows=(20000, 1000, 2000),
            sizes={"blocks": 1},
            batch=64,
            pretrain=4000,
            steps=200,
        ),
        Task(
            **_CIFAR,
            name="cifar-full",
            about="ResNet-20 on all of CIFAR-10 (JPEG)",
            rows=(48000, 2000, 10000),
            sizes={"blocks": 3},
            batch=128,
            pretrain=37500,
            steps=3750,
        ),
        Task(
            name="bert",
            kind="passages",
            counts="accuracy",
            about="a small BERT that tells which of the largest topics of pydoc_data a passage is from",
            read=passages_data,
            build=bert,
            rows=(4000, 190, 380),
            sizes={"vocab": 512, "tokens": 64, "hidden": 128, "layers": 2, "classes": 8},
            batch=32,
            pretrain=600,
            pretrain_lr=1e-3,
            steps=150,
            rates={"adamw": ADAMW},
            group="-g32",
            clip=1.0,
        ),
    )
}
