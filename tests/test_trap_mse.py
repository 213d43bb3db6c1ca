"""The best clip of the grid that is used, not of the textbook's: constants made for another grid lose accuracy."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from lightning_quant.grid import Grid
from lightning_quant.observers.mse import Mse

# Clip / sigma for Gaussian data: the optimum of two's complement with step clip / 2^(b-1), and the constants
# derived for 2^b bins with levels in their middles and a simplified rounding term (arXiv:1810.05723).
OURS = {2: 2.097, 3: 2.407, 4: 2.709, 5: 3.021, 6: 3.334}
OTHERS = {2: 1.71064, 3: 2.15159, 4: 2.55914, 5: 2.93620, 6: 3.28691}
SAMPLE = np.array([NormalDist().inv_cdf((i + 0.5) / 40000) for i in range(40000)])


def error(step: float, bits: int) -> float:
    """Mean squared error, float64."""
    code = np.clip(np.round(SAMPLE / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float(np.mean((code * step - SAMPLE) ** 2))


@pytest.mark.parametrize("bits", OURS)
def test_search_finds_the_optimum_of_its_own_grid(bits):
    grid = Grid(bits)
    rows = torch.tensor(SAMPLE, dtype=torch.float32)[None]
    scale, _ = grid.scale_and_zero(*Mse(candidates=800, smallest=0.1).range(rows, grid))
    clip = scale.item() * 2 ** (bits - 1)
    assert clip == pytest.approx(OURS[bits], rel=0.012)
    wrong = OTHERS[bits] / 2 ** (bits - 1)
    assert error(scale.item(), bits) < error(wrong, bits)
    if bits <= 4:  # further up both are close
        assert clip != pytest.approx(OTHERS[bits], rel=0.02)


def test_the_default_search_is_close_to_it():
    rows = torch.tensor(SAMPLE, dtype=torch.float32)[None]
    for bits in OURS:
        grid = Grid(bits)
        scale, _ = grid.scale_and_zero(*Mse().range(rows, grid))
        assert error(scale.item(), bits) <= 1.02 * error(OURS[bits] / 2 ** (bits - 1), bits)
