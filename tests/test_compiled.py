"""Compiled kernels have the bits of the plain arithmetic forward, and its gradients; nothing compiles in mid-run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from lightning_quant import QuantConfig, QuantController, attach
from lightning_quant.attach import quantizers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports


def pair(method, scheme, dtype=torch.float32, **options):
    """The same small network on the grid, plain and compiled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32)).to(dtype)
    twin = copy.deepcopy(model)
    for module, compiled in ((model, False), (twin, True)):
        attach(module, QuantConfig.parse(method, scheme, compile=compiled, calibration=1, **options))
        assert all(q.compiled == compiled for _, q in quantizers(module))
    return model, twin


CASES = [
    ("ste", "w4a16-g32", torch.float32, {}),
    ("lsq", "w3a16-g32-asym", torch.float32, {}),
    ("pege", "w4a8-g32", torch.float32, {"initial": 0.5, "lam": 0.01}),
    ("ste", "w4a16-g32", torch.bfloat16, {"grid": "nf4"}),
]


@pytest.mark.parametrize(("method", "scheme", "dtype", "options"), CASES)
def test_same_bits_forward_and_same_gradients(method, scheme, dtype, options):
    model, twin = pair(method, scheme, dtype, **options)
    for rows in (8, 5):
        x = torch.randn(2, rows, 64, dtype=dtype)
        y, z = model(x), twin(x)
        assert torch.equal(y, z)
        model.zero_grad()
        twin.zero_grad()
        y.float().square().mean().backward()
        z.float().square().mean().backward()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert torch.allclose(p.grad, q.grad, rtol=tolerance, atol=tolerance * p.grad.abs().max()), name


def test_nothing_compiles_after_the_second_step():
    """Ramps of lambda, learned scales and Theta, frozen ranges, a batch of another size before: the kernels stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32))
    ramp = {"curve": "cosine", "start": 0.0, "end": 0.1, "delay": 0.2}
    config = QuantConfig.parse("pege", "w4a8-static-g32", compile=True, calibration=1, lam=ramp)
    controller = QuantController(config)
    controller.prepare(model)
    controller.begin(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kernels = []
    for step in range(8):
        controller.on_step(step)
        model(torch.randn(6 + step, 64)).square().mean().backward()
        controller.before_optimizer_step()
        optimizer.step()
        controller.after_optimizer_step()
        optimizer.zero_grad()
        kernels.append(counters["stats"]["unique_graphs"])
    assert kernels[0] > 0
    assert kernels[1:] == kernels[1:2] * 7


def test_a_theta_of_bytes_takes_the_same_step():
    """Where kernels add in another order, a number may fall to the other side of its draw: by one, and rarely."""
    model, twin = pair("pege", "w4a16-g32", theta="element", initial=0.5)
    x = torch.randn(32, 64)
    for module in (model, twin):
        module(x).square().mean().backward()
        for layer in module:
            if hasattr(layer, "weight_quant"):
                layer.weight_quant.estimator.before_optimizer_step(layer.weight_quant, layer.weight)
    start, gaps = round(255 * 0.5), []
    for layer, other in zip(model, twin, strict=True):
        if hasattr(layer, "weight_quant"):
            ours, theirs = layer.weight_quant.theta.int(), other.weight_quant.theta.int()
            assert (ours != start).any()
            gaps.append((ours - theirs).abs().flatten())
    gap = torch.cat(gaps)
    assert gap.max() <= 1
    assert gap.float().mean() < 1e-3


def test_methods_that_go_backward_twice_stay_plain():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    attach(model, QuantConfig.parse("ewgs", "w4a16-g32", compile=True, delta="hessian"))
    assert not any(q.compiled for _, q in quantizers(model))


def test_both_front_ends_ask_for_it():
    from hf_integration import QuantArguments
    from lightning_quant.callback import QuantCallback

    assert QuantArguments(quant="ste", quant_compile=True).to_config().compile
    assert not QuantArguments(quant="ste").to_config().compile
    assert QuantCallback("ste", "w4a16-g32", options={"compile": True}).config.compile
