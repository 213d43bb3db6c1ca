"""C++ kernels of fake quantization: the bits of the plain arithmetic forward, its gradients backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach, noise
from lightning_quant.estimators import build_estimator, native
from lightning_quant.estimators.base import Settings, gradients, quantized
from lightning_quant.estimators.pege import stepped
from lightning_quant.grid import Grid

pytestmark = pytest.mark.skipif(not native.is_built(), reason="needs AVX2 and a C++ compiler")

RULES = {
    "ste": ("ste", {}),
    "ste, no mask": ("ste", {"mask": "none"}),
    "ste, half a step": ("ste", {"mask": "round"}),
    "lsq": ("lsq", {}),
    "ewgs": ("ewgs", {"delta": 0.3}),
    "pege": ("pege", {}),
    "pege, element": ("pege", {"theta": "element"}),
}
VIEWS = {  # x, scale, Theta
    "groups": ((24, 3, 32), (24, 3, 1), (24, 3, 1)),
    "channels": ((24, 96), (24, 1), (24, 1)),
    "a tensor, Theta in groups": ((6, 5, 20), (1,), (6, 5, 1)),
    "channels in groups": ((6, 3, 16), (6, 1, 1), (6, 3, 1)),
    "odd sizes": ((5, 7), (5, 1), (5, 1)),
    "one long row": ((1, 2500), (1, 1), (1, 1)),
}
ZEROS = ("none", "half", "per scale")


def case(rule_name, view, zero_kind):
    torch.manual_seed(len(rule_name) + len(view))
    method, options = RULES[rule_name]
    rule = build_estimator(method, options)
    shape, of_scale, of_theta = VIEWS[view]
    x, grad = torch.randn(shape), torch.randn(shape)
    scale = torch.rand(of_scale) * 0.1 + 0.15
    zero = {"none": 0.0, "half": -0.5, "per scale": torch.randint(-3, 3, of_scale).float()}[zero_kind]
    inputs = ()
    if method == "pege":
        theta = torch.rand(of_theta)
        if rule.theta == "element":
            theta = torch.randint(0, 256, shape, dtype=torch.uint8)
        inputs = (theta, torch.tensor(4.0), torch.tensor(0.02))
    settings = Settings(Grid(4, zero_kind != "per scale"), True, True, True, rule)
    return settings, grad, (x, scale, zero, None, *inputs)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rule", RULES)
def test_as_the_plain_arithmetic(rule, view, zero):
    settings, grad, given = case(rule, view, zero)
    assert native.fits(settings, *given)
    x = given[0]
    want = quantized(settings, *given)
    assert torch.equal(native.quantized(settings, *given), want)
    for interior in (True, False):
        settings = settings._replace(interior=interior)
        for learns in (True, False):
            expected = gradients(settings, learns, grad, *given)
            before = grad.clone()
            found = native.gradients(settings, learns, grad, *given)
            assert torch.equal(grad, before)
            memory = torch.empty_like(x)
            both = native.gradients(settings, learns, grad.clone(), *given, spare=memory, again=True)
            assert torch.equal(both.y, want)
            assert both.y is memory
            for one in (found, both):
                torch.testing.assert_close(one.x, expected.x, rtol=1e-5, atol=1e-6)
                assert (one.scale is None) == (expected.scale is None)
                for a, b in zip((one.scale, *one.state), (expected.scale, *expected.state), strict=True):
                    if b is not None:
                        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ties_ends_and_numbers_that_are_none():
    rule = build_estimator("ste", {})
    settings = Settings(Grid(4), True, True, True, rule)
    scale = torch.tensor([[0.25]])
    u = [0.5, 1.5, -0.5, -2.5, 7.0, 7.5, math.nextafter(7.0, 8.0), -8.0, -8.5, 1e30, -math.inf, math.inf, math.nan]
    x = torch.tensor([u]) * scale
    given = (x, scale, 0.0, None)
    want = quantized(settings, *given)
    found = native.quantized(settings, *given)
    assert torch.equal(found.nan_to_num(99.0), want.nan_to_num(99.0))
    assert want[0, -1].isnan()
    grad = torch.ones_like(x)
    grad[0, 0] = math.nan
    expected, got = (f(settings, False, grad, *given).x for f in (gradients, native.gradients))
    assert torch.equal(got.nan_to_num(99.0), expected.nan_to_num(99.0))


def test_what_is_left_to_the_compiler():
    settings, _, (x, scale, zero, table) = case("lsq", "groups", "none")
    assert not native.fits(settings, x.double(), scale.double(), zero, table)
    assert not native.fits(settings, x.bfloat16(), scale, zero, table)
    assert not native.fits(settings, x.transpose(0, 2), scale.transpose(0, 2), zero, table)
    assert not native.fits(settings, x, scale, zero, Grid(4, kind="nf4").table())
    assert not native.fits(settings._replace(rule=build_estimator("dsq", {})), x, scale, zero, table)


@pytest.mark.parametrize("method", ["ste", "lsq", "ewgs", "pege"])
def test_a_layer_is_that_of_the_plain_arithmetic(method):
    """Forward to the bit, gradients to rounding, and the rounded weight of backward is that of forward."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(64, 48))
        attach(layer, QuantConfig.parse(method, "w4a16-g32", compile=compiled, head=True))
        x = torch.randn(5, 64, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        found.append((y, x.grad, *(p.grad for p in layer.parameters())))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_a_compiler_nothing_breaks(monkeypatch):
    monkeypatch.setattr(native, "is_built", lambda: False)
    settings, _, given = case("lsq", "groups", "none")
    assert not native.fits(settings, *given)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("view", ["groups", "channels", "odd sizes", "one long row"])
def test_a_step_of_theta_in_bytes(view, zero):
    """Where sums round otherwise a number may fall to the other side of its draw: by one, and rarely."""
    settings, grad, (x, scale, zero, table, *inputs) = case("pege, element", view, zero)
    grad.view(-1)[3] = math.inf
    grad.view(-1)[4] = math.nan
    drawn = noise.seed(torch.tensor(12345), 0xDEADBEEF)
    want = stepped(settings, grad, x, scale, zero, table, drawn, *inputs)
    before = inputs[0].clone()
    found = native.theta_step(settings, grad, x, scale, zero, table, drawn, *inputs)
    assert found is inputs[0]
    gap = (found.int() - want.int()).abs()
    assert gap.max() <= 1
    assert gap.float().mean() <= 2e-3
    assert (found != before).float().mean() > 0.3
