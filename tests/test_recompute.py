"""Linear layers that round once more in backward: the same bits everywhere, and no rounded weight is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach, calibrate


def network(recompute, method="ste", scheme="w4a16-g32"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))
    attach(model, QuantConfig.parse(method, scheme, recompute=recompute))
    return model


@pytest.mark.parametrize("method", ["ste", "lsq", "pege", "stochastic", "freeze"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a8-g32", "w8a8-static"])
def test_the_same_bits(method, scheme):
    pair = [network(r, method, scheme) for r in (False, True)]
    x = torch.randn(4, 7, 64)
    grads = []
    for model in pair:
        given = x.clone().requires_grad_()
        y = model(given)
        y.square().sum().backward()
        grads.append([y, given.grad, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_a_backward_through_the_backward(method):
    """Hessian of the loss by a vector, as a method that measures curvature takes it."""
    found = []
    for recompute in (False, True):
        model = network(recompute, method)
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
        weight = model[0].weight
        (g,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), weight)
        found.append(h)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_may_be_changed_in_place(bias):
    """As ``hidden += residual`` does, for which the output must be no view of another tensor."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32, bias=bias))
        attach(model, QuantConfig.parse("ste", "w4a16-g32", recompute=recompute, head=True))
        y = model(torch.randn(2, 3, 64))
        y += 1
        y.square().sum().backward()
        grads.append(model[0].weight.grad)
    assert torch.equal(*grads)


def test_no_rounded_weight_is_kept():
    """All that backward keeps of a layer beside its input is its own parameters."""
    for recompute in (True, False):
        model = network(recompute)
        own = {p.data_ptr() for p in model.parameters()}
        sizes = {p.numel() for p in model.parameters() if p.ndim == 2}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            model(torch.randn(3, 64))
        rounded = [t for t in kept if t.numel() in sizes and t.data_ptr() not in own]
        assert bool(rounded) != recompute


@pytest.mark.parametrize(("method", "scheme"), [("ste", "w8a8-static"), ("lsq", "w8a8-static"), ("pege", "w8a8")])
def test_one_input_is_kept(method, scheme):
    """The float one: its rounded self is made once more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    attach(model, QuantConfig.parse(method, scheme, head=True))
    calibrate(model, [torch.randn(48, 64)])
    x, kept = torch.randn(48, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]


def test_what_is_measured_is_measured_once():
    model = network(True)
    quantizer = model[0].weight_quant
    quantizer.measuring = True
    y = model(torch.randn(3, 64))
    before = dict(quantizer.measured)
    y.sum().backward()
    assert all(quantizer.measured[k] is v for k, v in before.items())
    assert quantizer.measuring


def test_hooks_of_quantizers_are_called():
    model, seen = network(True), []
    model[0].weight_quant.register_forward_hook(lambda q, args, y: seen.append(y))
    model(torch.randn(3, 64))
    assert len(seen) == 1
    assert torch.equal(seen[0], model[0].on_grid())
