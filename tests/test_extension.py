"""A method, an observer, a range and a codebook from outside: nothing here edits the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from hf_integration import QuantArguments
from lightning_quant import ESTIMATORS, OBSERVERS, QuantCallback, QuantConfig, QuantController
from lightning_quant.catalog import table
from lightning_quant.codebooks import CODEBOOKS, Codebook
from lightning_quant.estimators import About, Bins, Estimator, Gradient
from lightning_quant.observers import Observer
from lightning_quant.ranges import RANGES
from lightning_quant.ranges.scale import Scale


@dataclass(frozen=True)
class Parabola(Estimator):
    """Slope 3/2 - 6 r^2 between two levels: a surrogate nobody has published.

    ``g_x = g * (1 + strength * (1/2 - 6 r^2))``, r in [-1/2, 1/2] the place between two levels; mean 1.
    """

    about: ClassVar[About] = About("nobody 2026", "", "2-8", "nothing", "w4a16")
    strength: float = 1.0

    @property
    def needs_bins(self) -> bool:
        return True

    def gradient(self, g, bins: Bins | None, inputs) -> Gradient:
        r = bins.offset(bins.error())
        task = g * (1 + self.strength * (0.5 - 6 * r.square()))
        return Gradient(task, task, ())


class Twice(Observer):
    """Twice the range."""

    def range(self, rows, grid):
        return 2 * rows.amin(dim=1), 2 * rows.amax(dim=1)


class Thirds(Codebook):
    """Four levels: -1, -1/3, 0, 1."""

    widths = (2,)

    def levels(self, bits, signed):
        return (-1.0, -1 / 3, 0.0, 1.0)


class Plain(Scale):
    """A scale whose gradient is not damped."""

    def factor(self, quantizer, x):
        return 1.0


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def train(config, model=None):
    model = model or net()
    controller = QuantController(config)
    controller.prepare(model)
    controller.begin(30)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, losses = torch.randn(32, 16), []
    for step in range(30):
        controller.on_step(step)
        loss = (model(x) - x[:, :4]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        controller.before_optimizer_step()
        optimizer.step()
        controller.after_optimizer_step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    return model, controller


def test_a_registered_class_is_reached_from_both_front_ends(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "parabola", Parabola)
    config = QuantConfig.parse("parabola", "w4a8-channel", strength=0.5)
    model, controller = train(config)
    assert model[0].weight_quant.estimator == Parabola(0.5)
    assert QuantCallback("parabola", "w4a16", options={"strength": 0.25}).controller.estimator == Parabola(0.25)
    flags = QuantArguments(quant="parabola", quant_scheme="w4a16", quant_option=["strength=0.25"])
    assert flags.to_config() == QuantConfig.parse("parabola", "w4a16", strength=0.25)
    assert "nobody 2026" in table()
    twin = QuantController(QuantConfig.from_dict(config.to_dict()))
    twin.load_state_dict(controller.state_dict())
    with pytest.raises(ValueError, match=r"options of method 'parabola': .*Did you mean option 'strength'"):
        QuantCallback("parabola", "w4a16", options={"strenth": 1})


def test_its_gradient_is_its_formula(monkeypatch):
    model = net()
    QuantController(QuantConfig.parse(Parabola(), "w4a16-channel")).prepare(model)
    q, weight = model[0].weight_quant, model[0].weight.detach().double()
    q.double()
    leaf = weight.clone().requires_grad_()
    q(leaf).sum().backward()
    u = weight / q.scale
    r = u - u.floor() - 0.5
    inside = (u >= -8) & (u <= 7)
    torch.testing.assert_close(leaf.grad, (1.5 - 6 * r.square()) * inside, rtol=1e-9, atol=1e-9)


def test_an_object_stands_for_a_name_and_says_how_to_load_it_again():
    mine = Parabola(0.5)
    config = QuantConfig.parse(mine, "w4a16-channel")
    train(config)
    assert QuantCallback(mine, "w4a16").controller.estimator is mine
    data = config.to_dict()
    assert data["method"] == f"{__name__}:Parabola"
    assert data["options"] == {"strength": 0.5}
    with pytest.raises(ValueError, match=r"registered first: ESTIMATORS\['tests.test_extension:Parabola'\] = "):
        QuantController(QuantConfig.from_dict(data))
    with pytest.raises(ValueError, match="an object that stands alone, got Parabola with options"):
        QuantConfig.parse(mine, "w4a16", strength=1.0)


def test_a_registered_path_loads_what_an_object_saved(monkeypatch):
    config = QuantConfig.parse(Parabola(0.5), "w4a16-channel")
    monkeypatch.setitem(ESTIMATORS, f"{__name__}:Parabola", Parabola)
    assert QuantController(QuantConfig.from_dict(config.to_dict())).estimator == Parabola(0.5)


def test_observer_range_and_codebook_by_name(monkeypatch):
    monkeypatch.setitem(OBSERVERS, "twice", Twice)
    monkeypatch.setitem(RANGES, "plain", Plain)
    monkeypatch.setitem(CODEBOOKS, "thirds", Thirds())
    model, _ = train(QuantConfig.parse("lsq", "w4a16-channel", observer="twice", range="plain"))
    assert isinstance(model[0].weight_quant.range, Plain)
    model, _ = train(QuantConfig.parse("ste", "w2a16-channel", grid="thirds"))
    layer = model[0]
    levels = (layer.weight_quant.eval()(layer.weight) / layer.weight_quant.scale).detach()
    assert {round(v, 4) for v in levels.flatten().tolist()} <= {-1.0, -0.3333, 0.0, 1.0}
