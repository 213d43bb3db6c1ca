"""The Hessian's trace by Hutchinson, and EWGS's delta from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

from lightning_quant import QuantConfig, QuantController
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.curvature import curvature
from lightning_quant.estimators.ewgs import Ewgs

torch.manual_seed(0)


def setting(scheme="w4a16-channel", depth=2, **options):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)][: 3 if depth == 2 else 1]
    model = nn.Sequential(*layers, nn.BatchNorm1d(3 if depth == 2 else 5)).double()
    controller = QuantController(QuantConfig.parse("ewgs", scheme, delta="hessian", **options))
    controller.prepare(model)
    controller.begin(40)
    controller.on_step(1)
    x = torch.randn(7, 6, dtype=torch.float64)
    return model, controller, x


def full(model, layer, loss):
    """Trace of the whole Hessian, standard deviation of v^T H v, and spread of the gradient, range = 1."""
    q, weight = layer.weight_quant, layer.weight
    width = (q.scale * (q.high - q.low)).detach()
    hard = q(weight).detach()

    def of(shift):
        handle = q.register_forward_hook(lambda *_: hard + shift.reshape(hard.shape) * width)
        try:
            return loss()
        finally:
            handle.remove()

    zero = torch.zeros(hard.numel(), dtype=torch.float64)
    matrix = hessian(of, zero)
    (g,) = torch.autograd.grad(of(at := zero.clone().requires_grad_()), at)
    off = matrix - torch.diag(matrix.diagonal())
    return matrix.trace() / zero.numel(), (2 * off.square().sum()).sqrt() / zero.numel(), g.std(correction=0)


def test_trace_is_that_of_the_whole_hessian():
    model, _, x = setting()
    model.eval()
    loss = lambda: model(x).square().mean()  # noqa: E731
    estimates = curvature(model, loss, step=1, probes=1000, tolerance=0.0)
    for _, layer in quant_layers(model):
        trace, error, spread = full(model, layer, loss)
        got = estimates[layer.weight_quant]
        assert abs(got[0] - trace) < 3 * error / 1000**0.5
        assert 3 * error / 1000**0.5 < trace
        assert got[1] == pytest.approx(spread.item(), rel=1e-9)


def test_quadratic_loss_by_hand():
    """loss = sum (W x)^2 has the Hessian 2 x x^T per row of W: mean diagonal 2 mean(x^2), here of one sample."""
    model, _, _ = setting(depth=1)
    linear = model[0]
    linear.bias.data.zero_()
    x = torch.tensor([[1.0, -2.0, 0.0, 3.0, 1.0, -1.0]], dtype=torch.float64)
    width = (linear.weight_quant.scale * 15).detach()
    trace, _ = curvature(model, lambda: linear(x).square().sum(), 1, 4000, 0.0)[linear.weight_quant]
    hand = 2 * (width**2 * x.square()).mean()
    assert trace == pytest.approx(hand.item(), rel=0.05)


@pytest.mark.parametrize(("trace", "spread", "delta"), [(0.002, 0.05, 0.0133333), (-1.0, 0.05, 0.0), (0.1, 0.0, 0.0)])
def test_delta_of_curvature(trace, spread, delta):
    model, controller, _ = setting(depth=1)
    q = model[0].weight_quant
    controller.estimator.take_curvature(q, trace, spread)
    assert q.delta.item() == pytest.approx(delta, abs=1e-7)


@pytest.mark.parametrize("scheme", ["w4a16-channel", "w4a4-static-channel", "w4a8-dynamic-channel"])
def test_update_sets_every_delta_and_changes_nothing_else(scheme):
    model, controller, x = setting(scheme)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    controller.update_curvature(lambda: nn.functional.dropout(model(x), 0.5).square().mean())
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} <= {k for k in after if k.endswith("delta")}
    assert all(p.grad is None for p in model.parameters())
    assert all(q.delta >= 0 for _, q in quantizers(model))
    assert any(q.delta > 0 for _, q in quantizers(model) if q.is_weight)
    assert model[0].weight_quant._forward_hooks == {}


def test_a_delta_from_the_hessian_scales_like_a_fixed_one():
    model, _, _ = setting(depth=1)
    q = model[0].weight_quant
    q.delta.fill_(0.25)
    weight = model[0].weight.detach().clone().requires_grad_()
    g = torch.randn_like(weight)
    (got,) = torch.autograd.grad(q(weight), weight, g)
    q.estimator = Ewgs(delta=0.25)
    (want,) = torch.autograd.grad(q(weight), weight, g)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_when_it_is_due():
    _, controller, _ = setting(period=0.25)
    assert [s for s in range(41) if controller.wants_curvature(s)] == [10, 20, 30, 40]
    controller.total_steps = None
    with pytest.raises(ValueError, match=r"expected the number of optimizer steps of the run, got None"):
        controller.wants_curvature(1)
    plain = QuantController(QuantConfig.parse("ewgs", "w4a16"))
    assert not plain.wants_curvature(10)


def test_a_loss_without_second_derivative_is_refused():
    model, controller, x = setting()
    with pytest.raises(ValueError, match=r"ewgs.delta='hessian': expected a model that can be differentiated twice"):
        controller.update_curvature(lambda: torch.pdist(model(x)).square().sum())


@pytest.mark.parametrize("options", [{"delta": "hesian"}, {"delta": "hessian", "period": 0.0}, {"probes": 0}])
def test_refusals(options):
    with pytest.raises(ValueError, match=r"ewgs"):
        Ewgs(**options)
