"""The factor of DoReFa-Net's weight gradient, and the versions of it that are easy to get wrong."""

from __future__ import annotations

import pytest
import torch
from torch import tensor

from lightning_quant.estimators.dorefa import Dorefa
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_weight
from lightning_quant.scheme import TensorSpec

W = [-1.0, -0.2, 0.1, 0.5]
FACTOR = [0.55144113, 1.26188335, 1.29999197, 1.03263362]

WRONG = {
    "no slope of the tanh": lambda w: w / w.tanh().abs().max().detach(),
    "no division by the maximum": lambda w: w.tanh(),
    "maximum not constant": lambda w: w.tanh() / w.tanh().abs().max(),
    "half the range": lambda w: w.tanh() / w.tanh().abs().max().detach() / 2,
    "maximum of w": lambda w: w.tanh() / w.abs().max().detach(),
    "plain straight-through": lambda w: 1.0 * w,
}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_factor(bits):
    rule = Dorefa().role(True)
    spec = resolve_weight(TensorSpec(bits, True), False, rule)
    q = FakeQuantizer(spec, Granularity(spec.granularity), rule, shape=(1, 4), dtype=torch.float64)
    w = tensor([W], dtype=torch.float64, requires_grad=True)
    q(w).sum().backward()
    assert w.grad[0].tolist() == pytest.approx(FACTOR, rel=1e-7)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_versions_would_be_seen(name):
    w = tensor(W, dtype=torch.float64, requires_grad=True)
    WRONG[name](w).sum().backward()
    assert w.grad.tolist() != pytest.approx(FACTOR, rel=1e-2)
