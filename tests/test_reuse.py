"""Layers that read one input quantize it once, with the values and gradients of quantizing it each time."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_quant import QuantConfig, TensorSpec, attach, reuse


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return sum((i + 1) * torch.tanh(head(h)) for i, head in enumerate(self.heads))


def model(method="ste", scheme="w8a8-dynamic", **options):
    torch.manual_seed(0)
    net = Branches()
    attach(net, QuantConfig.parse(method, scheme, **options))
    return net


def grads(net, x, monkeypatch=None, run=None):
    if monkeypatch is not None:
        monkeypatch.setattr(reuse, "allowed", lambda x: False)
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = (run or (lambda f, x: f(x)))(net, x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


def count(monkeypatch):
    """Times an input was really quantized."""
    from lightning_quant.quantizer import FakeQuantizer

    calls = []
    blocks = FakeQuantizer.blocks

    def counted(self, x):
        if not self.is_weight:
            calls.append(self)
        return blocks(self, x)

    monkeypatch.setattr(FakeQuantizer, "blocks", counted)
    return calls


@pytest.mark.parametrize("run", [None, lambda f, x: checkpoint(f, x, use_reentrant=False)])
def test_once_and_the_same(monkeypatch, run):
    x = torch.randn(5, 8)
    shared = grads(model(), x, run=run)
    alone = grads(model(), x, monkeypatch)
    for a, b in zip(shared, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(shared[0], alone[0])


def test_siblings_quantize_once(monkeypatch):
    calls = count(monkeypatch)
    grads(model(), torch.randn(5, 8))
    assert len(calls) == 2  # the first layer's input, and one for three heads


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        ("pege", "w8a8", {}),
        ("ewgs", "w8a8", {}),
        ("ste", "w8a8-static", {}),
        ("pege_replace", "w8a8", {}),
    ],
)
def test_state_or_another_gradient_is_not_shared(monkeypatch, method, scheme, options):
    calls = count(monkeypatch)
    grads(model(method, scheme, **options), torch.randn(5, 8))
    assert len(calls) == 4


def test_changed_in_place_is_quantized_again():
    q = model().heads[0].input_quant
    x = torch.randn(5, 8, requires_grad=True) * 1
    before = q(x)
    assert q(x) is before
    with torch.no_grad():
        x.mul_(2)
    assert not torch.equal(q(x), before)


def test_nothing_is_kept_alive():
    q = model().heads[0].input_quant
    x = torch.randn(5, 8, requires_grad=True)
    y = q(x)
    refs = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert [r() for r in refs] == [None, None]


def test_evaluation_does_not_share(monkeypatch):
    calls = count(monkeypatch)
    with torch.no_grad():
        model()(torch.randn(5, 8))
    assert len(calls) == 4


def test_blocks_of_an_input_are_shared_in_the_inputs_shape(monkeypatch):
    spec = TensorSpec(8, granularity="group", group_size=4, dynamic=True)
    config = QuantConfig("ste", TensorSpec(8), spec)
    torch.manual_seed(0)
    net = Branches()
    attach(net, config)
    x = torch.randn(5, 8)
    calls = count(monkeypatch)
    shared = grads(net, x)
    assert len(calls) == 2  # the first layer's input, and that of the three heads
    torch.testing.assert_close(shared, grads(net, x, monkeypatch))
