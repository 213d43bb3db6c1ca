"""A quantized Linear layer as one node of autograd in C++: the bits of the one in Python, and when it is left out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_quant import QuantConfig, attach
from lightning_quant.estimators import native

pytestmark = [
    pytest.mark.skipif(not native.is_built(), reason="needs AVX2 and a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the compiler's own imports
]

METHODS = [
    ("ste", "w4a16-g32", {}),
    ("lsq", "w4a16-g32", {}),
    ("lsq", "w3a16-g32-asym", {}),
    ("ewgs", "w4a16-g64", {}),
    ("pege", "w4a16-g32", {"initial": 0.5, "lam": 0.01}),
    ("pege", "w4a16-g32", {"theta": "element", "initial": 0.5}),
    ("ste", "w8a8-static", {}),
    ("lsq", "w8a8-static", {}),
    ("ewgs", "w4a8-static-g32", {}),
    ("ste", "w8a8", {}),
]


def layer(method="ste", scheme="w4a16-g32", bias=True, **options) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=bias))
    given = {"compile": True, "calibration": 1, "head": True, **options}
    attach(model, QuantConfig.parse(method, scheme, **given))
    model(torch.randn(8, 64))  # ranges of inputs
    return model.eval().train()[0]


def names(y: torch.Tensor) -> set[str]:
    """Of all nodes of a graph."""
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        found.add(type(node).__name__ if "RoundedLinear" not in node.name() else "RoundedLinear")
        left += [n for n, _ in node.next_functions if n is not None]
    return found


def graph(own: nn.Linear, x: torch.Tensor) -> set[str]:
    return names(own(x))


def taken(own: nn.Linear, x: torch.Tensor) -> bool:
    return "RoundedLinear" in graph(own, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("method", "scheme", "options"), METHODS)
def test_as_the_node_in_python(monkeypatch, method, scheme, options, bias):
    own = layer(method, scheme, bias, **options)
    twin = copy.deepcopy(own)
    x, grad = torch.randn(3, 5, 64), torch.randn(3, 5, 48)
    results = []
    for one in (own, twin):
        given = x.clone().requires_grad_()
        assert taken(one, given) == (one is own)
        y = one(given)
        y.backward(grad)
        results.append([y, given.grad, *(p.grad for p in one.parameters())])
        monkeypatch.setattr(native, "rounded_linear", lambda *a: None)
    assert torch.equal(results[0][0], results[1][0])
    assert len(results[0]) > 2
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_straight_layer_are_those_of_its_rounded_operands():
    own = layer("ste", "w4a16-g32", mask="none")
    x = torch.randn(6, 64, requires_grad=True)
    own(x).square().sum().backward()
    weight = own.weight_quant.on_grid(own.weight).detach().requires_grad_()
    again = x.detach().requires_grad_()
    F.linear(again, weight, own.bias.detach()).square().sum().backward()
    torch.testing.assert_close(own.weight.grad, weight.grad)
    torch.testing.assert_close(x.grad, again.grad)


@pytest.mark.parametrize("frozen", ["weight", "x", "all but the scale"])
def test_only_what_is_asked_for(frozen):
    own = layer("lsq", "w4a16-g32")
    x = torch.randn(6, 64, requires_grad=frozen != "x")
    own.weight.requires_grad_(frozen == "x")
    if frozen == "all but the scale":
        x.requires_grad_(False)
        own.bias.requires_grad_(False)
    assert taken(own, x)
    own(x).sum().backward()
    assert (x.grad is not None) == x.requires_grad
    assert (own.weight.grad is not None) == (frozen == "x")
    assert own.weight_quant.scale.grad.abs().sum() > 0


def test_the_output_may_be_changed_in_place():
    own = layer()
    x = torch.randn(2, 3, 64)
    y = own(x)
    y += 1
    y.square().sum().backward()
    changed = own.weight.grad
    own.weight.grad = None
    (own(x) + 1).square().sum().backward()
    assert torch.equal(own.weight.grad, changed)


def test_inputs_and_gradients_that_are_not_in_one_piece():
    own = layer("lsq", "w8a8-static")
    x = torch.randn(64, 6).T.requires_grad_()
    assert not x.is_contiguous()
    own(x).T.contiguous().square().sum().backward()
    found, x.grad = x.grad, None
    again = x.detach().contiguous().requires_grad_()
    own(again).square().sum().backward()
    torch.testing.assert_close(found, again.grad)


def test_it_is_checkpointed_and_its_saved_tensors_are_the_float_ones():
    own = layer("lsq", "w4a16-g32")
    x = torch.randn(6, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = own(x)
    large = {x.data_ptr(), own.weight.data_ptr()}
    assert large < set(kept)
    assert {own.weight_quant.scale.data_ptr()} == set(kept) - large
    y.sum().backward()
    grad, own.weight.grad = own.weight.grad, None
    checkpoint(own, x, use_reentrant=False).sum().backward()
    assert torch.equal(own.weight.grad, grad)


def test_a_second_derivative_is_refused():
    own = layer()
    y = own(torch.randn(4, 64)).square().sum()
    with pytest.raises(RuntimeError, match=r"QuantConfig\.compile: expected .*create_graph=True\. Set compile=False"):
        torch.autograd.grad(y, own.weight, create_graph=True)


def test_where_it_is_left_out():
    x = torch.randn(4, 64)
    assert not taken(layer(compile=False), x)
    assert not taken(layer("dsq", "w4a16-g32"), x)
    own = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(own, x)
        assert own(x).dtype == torch.bfloat16
    hook = own.weight_quant.register_forward_hook(lambda *a: None)
    assert not taken(own, x)
    hook.remove()
    assert taken(own, x)
