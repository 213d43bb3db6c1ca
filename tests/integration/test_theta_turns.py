"""A Theta in bytes moves inside of backward where one backward is all of a step, and at the update everywhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_integration import QuantTrainer
from lightning_quant import QuantCallback, QuantConfig, QuantController, attach
from lightning_quant.attach import quant_layers
from lightning_quant.estimators import native
from lightning_quant.estimators.pege import Pege
from tests.integration.modules import QUIET, Mlp, images, trainer
from tests.integration.test_trainer import make

pytestmark = [
    *QUIET,
    pytest.mark.skipif(not native.is_built(), reason="needs AVX2 and a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the compiler's own imports
]

OPTIONS: dict[str, Any] = {"theta": "element", "initial": 0.5, "lam": 0.1, "compile": True, "head": True}


def config(scheme: str = "w3a16-g32", **options: Any) -> QuantConfig:
    return QuantConfig.parse("pege", scheme, **{**OPTIONS, **options})


def controlled(scheme: str = "w3a16-g32") -> tuple[QuantController, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 96))
    controller = QuantController(config(scheme))
    controller.prepare(model)
    controller.begin(10)
    return controller, model.train()


def thetas(model: nn.Module) -> list[torch.Tensor]:
    return [layer.weight_quant.theta.clone() for _, layer in quant_layers(model)]


def moved(model: nn.Module) -> list[bool]:
    return [layer.weight_quant.moved for _, layer in quant_layers(model)]


def close(found: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    """Where sums round otherwise a number may fall to the other side of its draw: by one, and rarely."""
    gaps = [(a.int() - b.int()).abs() for a, b in zip(found, want, strict=True)]
    return all(int(gap.max()) <= 1 and float(gap.float().mean()) <= 2e-3 for gap in gaps)


@pytest.mark.parametrize("scheme", ["w3a16-g32", "w4a16-channel"])
def test_both_ways_make_the_same_step(scheme):
    found = []
    for alone in (True, False):
        controller, model = controlled(scheme)
        before = thetas(model)
        controller.on_step(3, alone=alone)
        torch.manual_seed(1)
        model(torch.randn(8, 64)).square().mean().backward()
        assert moved(model) == [alone, alone]
        assert all(torch.equal(a, b) != alone for a, b in zip(thetas(model), before, strict=True))
        inside = thetas(model)
        controller.before_optimizer_step()
        if alone:
            assert all(torch.equal(a, b) for a, b in zip(thetas(model), inside, strict=True))
        assert all((a != b).float().mean() > 0.3 for a, b in zip(thetas(model), before, strict=True))
        found.append([thetas(model), [p.grad.clone() for p in model.parameters()]])
    assert close(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_each_step_starts_anew_and_without_word_of_it_nothing_moves():
    controller, model = controlled()
    x = torch.randn(8, 64)
    for step, alone in enumerate([True, False, True, True]):
        controller.on_step(step, alone=alone)
        before = thetas(model)
        model(x).square().mean().backward()
        assert moved(model) == [alone, alone]
        assert all(torch.equal(a, b) != alone for a, b in zip(thetas(model), before, strict=True))
    own = copy.deepcopy(model)
    before = thetas(own)
    for _ in range(2):  # the copy's turn is its own, and has moved already
        own(x).square().mean().backward()
        assert all(torch.equal(a, b) for a, b in zip(thetas(own), before, strict=True))


def test_a_model_without_memory_counts_its_turns():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32))
        attach(model, config(), fit=False)
    (layer,) = [layer for _, layer in quant_layers(model)]
    assert layer.weight_quant.theta.is_meta
    assert layer.weight_quant.turn.device.type == "cpu"
    assert not layer.weight_quant.moved


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_called_twice_waits_for_the_update(reentrant):
    """A layer that is used twice, and one whose forward is made again: the whole gradient says where Theta goes."""
    controller, model = controlled()
    controller.on_step(0, alone=True)
    before, x = thetas(model), torch.randn(8, 64, requires_grad=True)
    (model(x).sum() + model(2 * x).square().sum()).backward()
    assert moved(model) == [False, False]
    assert all(torch.equal(a, b) for a, b in zip(thetas(model), before, strict=True))
    controller.before_optimizer_step()
    assert all((a != b).any() for a, b in zip(thetas(model), before, strict=True))
    controller.on_step(1, alone=True)
    before = thetas(model)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert moved(model) == [reentrant, reentrant]  # which is the one whose first forward has no graph
    controller.before_optimizer_step()
    assert all((a != b).any() for a, b in zip(thetas(model), before, strict=True))


def test_evaluation_moves_nothing():
    controller, model = controlled()
    controller.on_step(0, alone=True)
    before, x = thetas(model), torch.randn(8, 64, requires_grad=True)
    with torch.no_grad():
        model(x)
    model.eval()(x).square().sum().backward()
    assert moved(model) == [False, False]
    assert all(torch.equal(a, b) for a, b in zip(thetas(model), before, strict=True))


@pytest.mark.parametrize("alone", [True, False])
def test_the_theta_of_a_frozen_weight_stays_while_its_scale_learns(alone):
    controller, model = controlled()
    model[0].weight.requires_grad_(False)
    controller.on_step(0, alone=alone)
    before = thetas(model)
    model(torch.randn(8, 64)).square().sum().backward()
    controller.before_optimizer_step()
    assert model[0].weight_quant.scale.grad.any()
    assert moved(model) == [False, alone]
    assert [torch.equal(a, b) for a, b in zip(thetas(model), before, strict=True)] == [True, False]


@pytest.fixture
def turns(monkeypatch) -> list[bool]:
    """Whether Theta has moved when its update is due."""
    seen: list[bool] = []
    update = Pege.before_optimizer_step

    def noted(self, quantizer, weight):
        seen.append(quantizer.moved)
        update(self, quantizer, weight)

    monkeypatch.setattr(Pege, "before_optimizer_step", noted)
    return seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(tmp_path, turns, accumulate):
    module = Mlp()
    fit = trainer(tmp_path, QuantCallback(config=config()), max_epochs=2, accumulate_grad_batches=accumulate)
    fit.fit(module, images())
    assert set(turns) == {accumulate == 1}
    assert module.losses[-1] < module.losses[0]
    assert all((theta != 128).any() for theta in thetas(module))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_transformers(tmp_path, turns, accumulate):
    run: QuantTrainer = make(
        tmp_path, config(head=False), gradient_accumulation_steps=accumulate, logging_strategy="no"
    )
    run.train()
    assert set(turns) == {accumulate == 1}
    assert all((theta != 128).any() for theta in thetas(run.model))
