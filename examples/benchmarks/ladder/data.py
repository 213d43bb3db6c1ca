"""Data and models of the accuracy ladder's tasks: readers that return three parts, builders with random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from causal_lm import read_text, train_tokenizer
from digits import DigitsCNN
from lightning_cifar10 import Block
from small_images import cifar as read_cifar
from small_images import digits as read_digits

if TYPE_CHECKING:
    from ladder.tasks import Task

Rows = tuple[Tensor, ...]


class Data(NamedTuple):
    """Rows of each part: images and labels, tokens and labels, or tokens alone."""

    train: Rows
    held_out: Rows
    test: Rows


def split(task: Task, rows: Rows) -> Data:
    """Rows shuffled once and cut into the three parts."""
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(0))
    if len(order) < sum(task.rows):
        raise ValueError(f"{task.name}: expected {sum(task.rows)} rows, got {len(order)}. Use the data it is made for.")
    parts = torch.split(order[: sum(task.rows)], list(task.rows))
    return Data(*(tuple(t[part] for t in rows) for part in parts))


def digits_data(task: Task, data: Path | None) -> Data:
    (x, y), (more, labels) = read_digits(None)
    return split(task, (torch.cat([x, more])[:, :1].contiguous(), torch.cat([y, labels])))


def cifar_data(task: Task, data: Path | None) -> Data:
    assert data is not None
    train, test = read_cifar(str(data / "cifar10"), sum(task.rows[:2]))
    cut, n = task.rows[0], task.rows[2]
    return Data(tuple(t[:cut] for t in train), tuple(t[cut:] for t in train), tuple(t[:n] for t in test))


def language_data(task: Task, data: Path | None) -> Data:
    """Text in blocks of tokens, its beginning for training; a second file, if there is one, is the test."""
    texts = [read_text(str(data / name)) for name in task.files] if data and task.files else [read_text(None)]
    tokenizer = train_tokenizer(texts[0], task.sizes["vocab"])
    blocks = [encoded(tokenizer, text, task.sizes["tokens"]) for text in texts]
    train, held_out, test = task.rows
    if len(blocks) == 1:
        blocks = [blocks[0][:-test], blocks[0][-test:]]
    if len(blocks[0]) < train + held_out or len(blocks[1]) < test:
        have = f"{len(blocks[0])} and {len(blocks[1])}"
        raise ValueError(f"{task.name}: expected {task.rows} rows, got {have}. Use the data it is made for.")
    return Data((blocks[0][:train],), (blocks[0][-held_out:],), (blocks[1][:test],))


def scattered_data(task: Task, data: Path | None) -> Data:
    """One text in blocks of tokens that go to the parts at random, so that all three are of the same kind.

    With its end held out, a longer float training looks like a worse one.
    """
    assert data is not None
    text = read_text(str(data / task.files[0]))
    return split(task, (encoded(train_tokenizer(text, task.sizes["vocab"]), text, task.sizes["tokens"]),))


def encoded(tokenizer: Any, text: str, tokens: int) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // tokens * tokens]).reshape(-1, tokens)


def passages_data(task: Task, data: Path | None) -> Data:
    """Passages of the largest topics of ``pydoc_data`` that are no part of a larger one, with the topic's number.

    A topic is cut into pieces of four passages, which go to one part each; those for training overlap inside a piece.
    """
    from pydoc_data.topics import topics

    chosen: list[str] = []
    for text in sorted(topics.values(), key=len, reverse=True):
        middle = text[len(text) // 2 :][:200]
        if len(chosen) < task.sizes["classes"] and not any(middle in other for other in chosen):
            chosen.append(text)
    tokenizer, tokens = train_tokenizer("\n\n".join(chosen), task.sizes["vocab"]), task.sizes["tokens"]
    draw = torch.Generator().manual_seed(0)
    found: list[list[Rows]] = [[], [], []]
    for label, text in enumerate(chosen):
        pieces = encoded(tokenizer, text, 4 * tokens)
        pieces = pieces[torch.randperm(len(pieces), generator=draw)]
        cuts = [int(0.7 * len(pieces)), int(0.8 * len(pieces))]
        for part, own, step in zip(found, pieces.tensor_split(cuts), (tokens // 4, tokens, tokens), strict=True):
            rows = own.unfold(1, tokens, step).reshape(-1, tokens)
            part.append((rows, torch.full((len(rows),), label)))
    return Data(*(shuffled(part, n, draw) for part, n in zip(found, task.rows, strict=True)))


def shuffled(parts: list[Rows], count: int, draw: torch.Generator) -> Rows:
    """So many rows of all topics together."""
    order = torch.randperm(sum(len(rows) for rows, _ in parts), generator=draw)[:count]
    return torch.cat([rows for rows, _ in parts])[order], torch.cat([labels for _, labels in parts])[order]


def cnn(task: Task, data: Data) -> nn.Module:
    return DigitsCNN(lr=0.0).net


def resnet(task: Task, data: Data) -> nn.Module:
    """ResNet-8 or -20 for small images: ``sizes["blocks"]`` blocks in each of three stages."""
    width, n = 16, task.sizes["blocks"]
    blocks = [Block(width, width, 1) for _ in range(n)]
    for inputs in (width, 2 * width):
        blocks += [Block(inputs, 2 * inputs, 2), *(Block(2 * inputs, 2 * inputs, 1) for _ in range(n - 1))]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
    return nn.Sequential(stem, *blocks, head)


def llama(task: Task, data: Data) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    width = task.sizes["hidden"]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.sizes["vocab"],
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=task.sizes["layers"],
            num_attention_heads=width // 32,
            num_key_value_heads=width // 64,
            max_position_embeddings=task.sizes["tokens"],
        )
    )


def bert(task: Task, data: Data) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    width = task.sizes["hidden"]
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=task.sizes["vocab"],
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=task.sizes["layers"],
            num_attention_heads=width // 32,
            max_position_embeddings=task.sizes["tokens"],
            num_labels=task.sizes["classes"],
        )
    )
