"""A quantized Linear layer as one node of autograd in C++: the bits of the one in Python, and when it is left out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_quant import QuantConfig, attach
from lightning_quant.calibration import calibrate
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
    calibrate(model, [torch.randn(8, 64)])
    return model.train()[0]


def nodes(y: torch.Tensor) -> list[str]:
    """Names of all nodes of a graph."""
    found, left = {}, [y.grad_fn]
    while left:
        node = left.pop()
        if node not in found:
            found[node] = node.name()
            left += [n for n, _ in node.next_functions if n is not None]
    return list(found.values())


def taken(own: nn.Linear, x: torch.Tensor) -> bool:
    return any("RoundedLinear" in name for name in nodes(own(x)))


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


def branches(scheme: str) -> nn.Module:
    """Three layers that read one tensor, as query, key and value do."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.heads = nn.ModuleList(nn.Linear(64, 16, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).tanh()
            return torch.cat([head(x) for head in self.heads], -1)

    torch.manual_seed(0)
    model = Branches()
    attach(model, QuantConfig.parse("ste", scheme, compile=True, calibration=1, head=True))
    calibrate(model, [torch.randn(8, 64)])
    return model.train()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_layers_with_one_input_share_what_is_made_of_it(monkeypatch, scheme):
    model = branches(scheme)
    x, grad = torch.randn(16, 64) * 3, torch.randn(16, 48)  # beyond the calibrated range: some of it is clipped
    y = model(x)
    assert sum("RoundedRows" in name or "RoundedInput" in name for name in nodes(y)) == 1  # x itself has no gradient
    assert sum("RoundedLinear" in name for name in nodes(y)) == 4
    y.backward(grad)
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(native, "is_built", lambda: False)
    monkeypatch.setattr(native, "_known", {})
    again = model(x)
    again.backward(grad)
    assert torch.equal(y, again)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-6)


def test_a_bit_of_each_element_is_kept_of_a_static_input():
    own = layer("ste", "w8a8-static", bias=False)
    x, kept = torch.randn(6, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        own(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    assert sorted(t.numel() * t.element_size() * 8 for t in kept if not t.is_floating_point())[-1] <= 2 * x.numel()
    assert sum(t.numel() == x.numel() for t in kept) == 1


def test_what_is_clipped_has_no_gradient_and_the_rest_has_all_of_it():
    own = layer("ste", "w8a8-static", bias=False)
    q = own.input_quant
    x = torch.rand(6, 64)
    x[1, 3], x[4, :2] = 100.0, -100.0
    x.requires_grad_()
    own(x).sum().backward()
    outside = x.detach().abs() > 127.5 * q.scale.item()
    assert outside.sum() == 3
    weight = own.weight_quant.on_grid(own.weight).sum(0).expand(6, 64)
    torch.testing.assert_close(x.grad, torch.where(outside, 0, weight), rtol=1e-4, atol=1e-4)


def test_a_changed_input_or_range_is_rounded_anew():
    model = branches("w8a8-static")
    x = torch.randn(4, 64, requires_grad=True) * 1
    one, other = model.heads[0], model.heads[1]
    one.weight.data.copy_(other.weight)
    one.weight_quant.load_state_dict(other.weight_quant.state_dict())
    assert torch.equal(one(x), other(x))
    other.input_quant.scale.mul_(2)
    assert not torch.equal(one(x), other(x))
    other.input_quant.scale.div_(2)
    before = one(x)
    with torch.no_grad():
        x.mul_(0.5)
    assert not torch.equal(before, other(x))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_numbers_that_are_none(monkeypatch, scheme, special):
    own = layer("ste", scheme)
    x = torch.randn(5, 64)
    x[2, 7] = special
    x[3] = 0
    if special == 0:
        own.weight.data[1] = 0
    results = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        y = own(given)
        y.sum().backward()
        results += [[y.detach(), given.grad]]
        monkeypatch.setattr(native, "is_built", lambda: False)
        monkeypatch.setattr(native, "_known", {})
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_batches_of_any_size_fill_no_memory(monkeypatch):
    monkeypatch.setattr(native, "_known", {})
    monkeypatch.setattr(native, "REMEMBERED", 5)
    own = layer("ste", "w8a8-static")
    for rows in range(1, 20):
        assert taken(own, torch.randn(rows, 64))
        assert len(native._known) <= 5


def test_memory_for_rounding_is_given_back_between_forward_and_backward():
    """Where a step's memory is at its peak."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 320), nn.Linear(320, 64))
    attach(model, QuantConfig.parse("lsq", "w4a16-g32", compile=True, head=True))
    x, largest = torch.randn(4, 64), 4 * model[1].weight.numel()
    for _ in range(2):  # what ran before may have left calls without a backward
        model(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(3):
            model(x).sum().backward()
    kept = [e.self_cpu_memory_usage for e in seen.events() if e.name == "lightning_quant::rounded_linear"]
    assert len(kept) == 9
    assert [i for i, n in enumerate(kept) if n <= -largest] == [
        5,
        8,
    ]  # what the profiler saw made: of the first step on
