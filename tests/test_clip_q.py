"""CLIP-Q: quantiles, bins, means, and weights that come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.estimators.clip_q import ClipQ
from tests.loop import Run, check_folded, check_run, convolutional, weights_lie_on_their_grid
from tests.oracle import clip_q as oracle


def quantizer(scheme, shape=(4, 32), **options):
    return Run("clip_q", scheme, nn.Sequential(nn.Linear(shape[1], shape[0])), **options).model[0].weight_quant


def test_by_hand():
    """p = 1/2, b = 2: -1 and -2 go, and 1, 2 of 1, 2, 4, 8; left side 1 (length 1), right 2 (length 4) of 3 bins."""
    q = quantizer("w2a16-tensor", (1, 9))
    w = tensor([[-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0]], requires_grad=True)
    y = q(w)
    assert y.tolist() == [[-3.5, -3.5, 0, 0, 0, 0, 0, 4, 8]]
    y.backward(torch.arange(9.0).reshape(1, 9))
    assert w.grad.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]
    codes = q.stored(w)[0]
    assert codes.tolist() == [[-2, -2, -1, -1, -1, -1, -1, 0, 1]]


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("bits", [1.58, 2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "g16"])
def test_against_the_oracle_and_codes_fit(bits, granularity, p):
    q = quantizer(f"w{bits:g}a16-{granularity}", p=p)
    w = torch.randn(4, 32)
    blocks = w.reshape({"tensor": (1, -1), "channel": (4, -1), "g16": (8, -1)}[granularity]).double().numpy()
    want = np.array([oracle.compress(row, p, bits) for row in blocks]).reshape(4, 32)
    np.testing.assert_allclose(q.on_grid(w), want, rtol=1e-6, atol=1e-7)
    codes = q.stored(w)[0]
    low, high = (-1, 1) if bits == 1.58 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert codes.min() >= low
    assert codes.max() <= high
    per_block = codes.reshape(blocks.shape)
    assert max(len(row.unique()) for row in per_block) <= high - low + 1
    if p == 0.9:
        assert (q.on_grid(w) == 0).double().mean() > 0.8


@pytest.mark.parametrize("p", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("bits", ["1.58", "2", "4"])
@pytest.mark.parametrize(
    "row",
    [
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 2.0, 3.0, 4.0],
        [-1.0, -2.0, -3.0, -4.0],
        [0.0, 0.0, 0.0, 5.0],
        [3.0, 3.0, 3.0, 3.0],
        [-2.0, 2.0, -2.0, 2.0],
        [-1e-30, 0.0, 1e-38, 1e-30],
        [-100.0, 1.0, 1.0, 1.0],
    ],
)
def test_degenerate_rows(row, bits, p):
    q = quantizer(f"w{bits}a16-channel", (2, 4), p=p)
    w = tensor([row, [1.0, -1.0, 0.5, -0.25]], requires_grad=True)
    y = q(w)
    y.sum().backward()
    assert y.isfinite().all()
    assert (w.grad == 1).all()
    np.testing.assert_allclose(y[0].tolist(), oracle.compress(np.array(row), p, float(bits)), rtol=1e-6)
    assert torch.equal(q.on_grid(w.detach()), y.detach())


def test_one_sided_rows_use_all_codes():
    q = quantizer("w3a16-channel", (1, 64), p=0.0)
    w = torch.linspace(1, 2, 64).reshape(1, 64)
    assert len(q.on_grid(w).unique()) == 7
    assert len(q.on_grid(-w).unique()) == 7


def test_pruned_weights_may_come_back():
    run = Run("clip_q", "w2a16", lr=0.05, p=0.6)
    layer = run.model[0]
    before = layer.weight_quant.on_grid(layer.weight) == 0
    assert before.float().mean() == pytest.approx(0.6, abs=0.02)
    run.steps(0, 30)
    after = layer.weight_quant.on_grid(layer.weight) == 0
    assert after.float().mean() == pytest.approx(0.6, abs=0.02)
    assert (before & ~after).any()


@pytest.mark.parametrize("scheme", ["w4a16", "w2a8-channel"])
def test_training(scheme, tmp_path):
    run = check_run(lambda: Run("clip_q", scheme, lr=0.02))
    if scheme.endswith("a16"):
        check_folded(run, tmp_path / "out")


def test_convolutions():
    run = Run("clip_q", "w3a8-channel", convolutional(), total=16).steps(0, 16)
    assert run.losses[-1] < run.losses[0]
    weights_lie_on_their_grid(run.model)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClipQ(p=1.0), r"clip_q.p: expected a share in \[0, 1\), got 1.0"),
        (lambda: quantizer("w1a16"), "0.weight: method 'clip_q': expected 1.58 to 8 bits, got 1 bit"),
        (lambda: quantizer("w4a16", grid="nf4"), "method 'clip_q': expected grid='int'"),
        (lambda: quantizer("w4a16-asym"), "method 'clip_q': expected symmetric=True"),
        (lambda: quantizer("w4a16", narrow=True), "method 'clip_q': expected narrow=False"),
        (lambda: quantizer("w4a16", learn_scale=True), "method 'clip_q': expected learn_scale=False"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
