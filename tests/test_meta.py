"""Models without memory: attach on the meta device, then give it memory and a training checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import QuantConfig, QuantController, attach
from lightning_quant.attach import quantizers
from lightning_quant.calibration import fit_weights, open_observers
from lightning_quant.errors import AttachError

STEPS = 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))


def batch(step: int) -> Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, controller: QuantController, steps: range) -> list[float]:
    """Losses of plain gradient descent, which keeps no state of its own."""
    controller.begin(STEPS)
    model.train()
    losses = []
    for step in steps:
        controller.on_step(step)
        model.zero_grad()
        loss = (model(batch(step)) - batch(step)[:, :8]).square().mean()
        loss.backward()
        controller.before_optimizer_step()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
        controller.after_optimizer_step()
        losses.append(loss.item())
    return losses


def by_to_empty(model: nn.Module, state: dict[str, Tensor]) -> None:
    for t in (*model.parameters(), *model.buffers()):  # memory that was in use holds anything
        assert t.is_meta or t.numel() < 64 * 32
    model.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(77)
    model.load_state_dict(state)


def by_assigning(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(copy.deepcopy(state), assign=True)


CONFIGS = {
    "pege": QuantConfig.parse("pege", "w4a8-static-g32", calibration=2, lam=0.1),
    "pege per element": QuantConfig.parse("pege", "w2a16-g32", theta="element", lam=0.1),
    "a codebook": QuantConfig.parse("ste", "nf4-g32"),
    "a delay": QuantConfig.parse("lsq", "w4a8-static-channel", calibration=2, delay=0.75),
    "frozen weights": QuantConfig.parse("freeze", "w4a16-channel", threshold=0.0, momentum=0.5),
    "asymmetric": QuantConfig.parse("lsq", "w4a8-asym-static-channel", calibration=2),
    "dynamic": QuantConfig.parse("ewgs", "w8a8-dynamic"),
}


@pytest.mark.parametrize("load", [by_to_empty, by_assigning])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_goes_on_in_a_model_that_had_no_memory(name, load):
    config = CONFIGS[name]
    real, controller = net(), QuantController(config)
    controller.prepare(real)
    train(real, controller, range(4))
    state = copy.deepcopy(real.state_dict())

    with torch.device("meta"):
        other = net()
    again = QuantController(config)
    attach(other, config, fit=False)
    again.prepare(other)
    load(other, state)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert all(q.ready for _, q in quantizers(other))
    open_observers(real, False)  # what evaluation shows is none of training's
    real.eval()
    other.eval()
    assert torch.equal(other(batch(9)), real(batch(9)))
    assert train(other, again, range(4, STEPS)) == train(real, controller, range(4, STEPS))
    for key, value in real.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_accelerates_empty_weights():
    accelerate = pytest.importorskip("accelerate")
    config = CONFIGS["pege"]
    with accelerate.init_empty_weights():
        model = net()
    attach(model, config, fit=False)
    real = net()
    attach(real, config)
    model.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(model.eval()(batch(0)), real.eval()(batch(0)))


@pytest.mark.parametrize("by", ["hand", "the controller"])
def test_ranges_are_fitted_once_there_are_weights(by):
    """Float weights alone: as attached to the real model, and said where it is forgotten."""
    config = QuantConfig.parse("lsq", "w4a16-channel")
    with torch.device("meta"):
        model = net()
    attach(model, config, fit=False)
    model.load_state_dict(net().state_dict(), assign=True, strict=False)
    with pytest.raises(ValueError, match=r"expected a range, got none: attached with fit=False.*fit_weights\(model\)"):
        model(batch(0))
    if by == "hand":
        fit_weights(model, missing=True)
    else:
        controller = QuantController(config)
        controller.prepare(model)
        controller.begin(STEPS)
    real = net()
    attach(real, config)
    for key, value in real.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model(batch(0)), real(batch(0)))


def test_a_range_that_was_loaded_is_not_fitted_anew():
    model, config = net(), QuantConfig.parse("lsq", "w4a16-channel")
    attach(model, config)
    with torch.no_grad():
        for _, q in quantizers(model):
            q.scale.mul_(3)
    before = copy.deepcopy(model.state_dict())
    controller = QuantController(config)
    controller.prepare(model)
    controller.begin(STEPS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_attaching_to_what_is_not_there_says_how():
    with torch.device("meta"):
        model = net()
    with pytest.raises(
        AttachError, match=r"got a meta tensor. Load the weights, then attach; or attach\(.*fit=False\)"
    ):
        attach(model, CONFIGS["pege"])
