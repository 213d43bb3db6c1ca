"""The counter-based noise is a pure function, matches its definition, and is uniform."""

from __future__ import annotations

import torch

from lightning_quant.noise import uniform
from tests import oracle


def _step(value):
    return torch.tensor(value, dtype=torch.int64)


def test_matches_the_definition():
    for step, salt in ((0, 0), (1, 7), (123_456, 0xDEADBEEF), (3, ~5)):
        got = uniform(torch.Size((3, 11)), _step(step), salt)
        assert got.dtype == torch.float32
        assert got.tolist() == oracle.uniform((3, 11), step, salt).tolist()


def test_same_arguments_same_numbers_other_arguments_other_numbers():
    shape = torch.Size((64,))
    base = uniform(shape, _step(5), 9)
    assert torch.equal(base, uniform(shape, _step(5), 9))
    assert (base != uniform(shape, _step(6), 9)).float().mean() > 0.9
    assert (base != uniform(shape, _step(5), 10)).float().mean() > 0.9


def test_uniform_over_elements_and_over_steps():
    many = uniform(torch.Size((200_000,)), _step(3), 1)
    assert many.min() >= 0
    assert many.max() < 1
    counts = torch.histc(many, bins=20, min=0, max=1) / many.numel()
    assert (counts - 0.05).abs().max() < 0.003  # 6 standard deviations
    one = torch.stack([uniform(torch.Size((8,)), _step(t), 1) for t in range(2000)])
    assert (one.mean(dim=0) - 0.5).abs().max() < 0.04
    correlation = torch.corrcoef(torch.stack([one[:-1].flatten(), one[1:].flatten()]))[0, 1]
    assert correlation.abs() < 0.04


def test_empty():
    assert uniform(torch.Size((0, 4)), _step(0), 0).shape == (0, 4)
