"""The range with one upper bound: levels, gradients, refusals; and the scale with the plain chain rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn, tensor

from lightning_quant.attach import attach
from lightning_quant.estimators.ste import Ste
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig


def clipped(bits=2, alpha=6.0, learn=True, dtype=torch.float64):
    spec = TensorSpec(bits, False, "tensor", None, False, "ema", learn, range="clip")
    q = FakeQuantizer(
        resolve_activation(spec, False, Ste()), Granularity("tensor", None), Ste(), channels=4, dtype=dtype
    )
    if alpha is not None:
        q.set_range(tensor([-9.0]), tensor([alpha]))
    return q


@pytest.mark.parametrize(
    ("x", "y", "dx", "dalpha"), [(0.7, 0.0, 1, 0), (2.0, 2.0, 1, 0), (7.0, 6.0, 0, 1), (-1.0, 0.0, 0, 0)]
)
def test_published_values(x, y, dx, dalpha):
    """alpha = 6, 2 bits."""
    q = clipped()
    at = tensor([[x]], dtype=torch.float64, requires_grad=True)
    out = q(at)
    out.sum().backward()
    assert out.item() == pytest.approx(y, abs=1e-12)
    assert at.grad.item() == dx
    assert q.upper.grad.item() == pytest.approx(dalpha, abs=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_all_codes_serve_values_from_0_to_alpha(bits):
    q = clipped(bits, alpha=3.0)
    levels = q(torch.linspace(-1, 5, 4001, dtype=torch.float64)).unique()
    torch.testing.assert_close(levels, torch.linspace(0, 3, 2**bits, dtype=torch.float64))


def test_gradient_of_alpha_is_the_sum_over_clipped_values_with_no_factor():
    q = clipped(4, alpha=1.0)
    x = torch.randn(64, 9, dtype=torch.float64)
    g = torch.randn(64, 9, dtype=torch.float64)
    q(x).backward(g)
    torch.testing.assert_close(q.upper.grad, g[x > 1].sum().reshape(1))


def test_negative_data_and_bounds_near_0():
    q = clipped(alpha=None)
    assert not q.ready
    assert q(torch.rand(3, 4, dtype=torch.float64)).isfinite().all()  # each sample's own range
    q.set_range(tensor([-2.0]), tensor([0.0]))
    assert q.upper.tolist() == [1]
    q.upper.data.fill_(-1.0)
    q.range.project(q)
    assert q.upper.item() == pytest.approx(1e-6)


def test_state_dict_makes_it_ready():
    q, fresh = clipped(alpha=2.5), clipped(alpha=None)
    fresh.load_state_dict(q.state_dict())
    assert fresh.ready
    x = torch.rand(3, 4, dtype=torch.float64) * 4
    assert torch.equal(fresh(x), q(x))


def test_fixed_bound_is_a_buffer():
    q = clipped(learn=False)
    assert not dict(q.named_parameters())
    assert "upper" in q.state_dict()


def test_refusals():
    spec = TensorSpec(2, False, "tensor", range="clip")
    with pytest.raises(ValueError, match=r"fc.weight: range='clip': expected inputs, .*got weights. Set it in the act"):
        resolve_weight(spec, False, Ste(), "fc.weight")
    with pytest.raises(ValueError, match=r"expected an asymmetric integer grid, got symmetric=True.*symmetric=False"):
        resolve_activation(replace(spec, symmetric=True), False, Ste(), "fc.input")


def test_with_another_method_by_specs():
    activation = TensorSpec(4, False, range="clip", learn_scale=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    attach(model, QuantConfig("ste", TensorSpec(8), activation))
    assert model[2].input_quant.spec.range == "clip"
    assert isinstance(model[2].input_quant.upper, nn.Parameter)


def test_plain_is_scale_without_the_factor():
    grads = []
    x = torch.randn(4, 8, dtype=torch.float64)
    for name in ("scale", "plain"):
        spec = resolve_weight(TensorSpec(4, True, "channel", learn_scale=True, range=name), True, Ste())
        q = FakeQuantizer(spec, Granularity("channel"), Ste(), shape=(4, 8), dtype=torch.float64)
        q.fit_range(x)
        y = q(x)
        y.square().sum().backward()
        grads.append((y.detach(), q.scale.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1] * (8 * 7) ** 0.5, grads[1][1])
