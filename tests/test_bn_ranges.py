"""Ranges of inputs from batch normalizations: hand values, what may lie between, and a network without any data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_quant import QuantConfig, attach, calibrate
from lightning_quant.bn_ranges import ranges_from_norms
from lightning_quant.graph import flow
from lightning_quant.observers.bn_stats import BnStats, promised
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import LayerRule
from tests.convnets import MobileNetV2, ResNet20, digits, train

CONFIG = QuantConfig(method="ste", weight=TensorSpec(8), activation=TensorSpec(8, observer="bn_stats", dynamic=False))


def norm(beta: list[float], gamma: list[float]) -> nn.BatchNorm2d:
    out = nn.BatchNorm2d(len(beta))
    with torch.no_grad():
        out.bias.copy_(torch.tensor(beta))
        out.weight.copy_(torch.tensor(gamma))
    return out


class Paths(nn.Module):
    """What ranges are followed through; each reader has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = norm([1.0, -1.0], [0.5, 1.0]), norm([0.0, 0.0], [0.5, -0.25])  # (-7, 5) and (-3, 3)
        names = ("image", "plain", "positive", "six", "added", "joined", "twice", "shifted", "pooled", "last")
        self.readers = nn.ModuleDict({n: nn.Conv2d(4 if n == "joined" else 2, 2, 1) for n in names})
        self.relu, self.relu6, self.pool = nn.ReLU(), nn.ReLU6(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        r, a, b = self.readers, self.one(x), self.two(x)
        positive = F.relu(a)
        total = r["image"](x) + r["plain"](a) + r["positive"](self.relu(a)) + r["six"](self.relu6(a))
        total = total + r["added"](positive + b) + r["joined"](torch.cat([positive, b], 1)) + r["twice"](b + b)
        total = total + r["shifted"](b + 1.0) + F.interpolate(r["pooled"](self.pool(positive)), scale_factor=2.0)
        return r["last"](total)


def test_what_lies_between_is_followed():
    model = Paths()
    found = ranges_from_norms(model, flow(model), [f"readers.{name}" for name in model.readers])
    assert {path.removeprefix("readers."): ends for path, ends in found.items()} == {
        "plain": (-7, 5),
        "positive": (0, 5),
        "six": (0, 5),
        "added": (-3, 8),
        "joined": (-3, 5),
        "twice": (-6, 6),
        "pooled": (0, 5),
    }  # nothing bounds the image, a number that is added, and what layers make


def test_six_standard_deviations():
    assert promised(torch.tensor([1.0, -2.0]), torch.tensor([0.5, -0.5])) == (-5, 4)
    x = 3 * torch.randn(4096, 8, 2, 2) + 1
    layer = nn.BatchNorm2d(8)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    low, high = promised(layer.bias.detach(), layer.weight.detach())
    y = layer(x).detach()
    assert low <= float(y.min())
    assert float(y.max()) <= high < 2 * float(y.max())


def test_ranges_are_those_of_the_norms_and_stay():
    """No calibration moves them; a reader of the image observes data, and the report says which is which."""
    model = Paths()
    report = attach(model, CONFIG)
    assert "readers.positive: w8" in (text := "\n".join(f"{e.path}: {e.what}" for e in report.attached))
    assert text.count("input range from batch normalization") == 7
    assert text.count("input range from data") == 3
    quant = model.readers["added"].input_quant
    assert isinstance(quant.observer, BnStats)
    scale, zero = quant.scale.clone(), quant.zero.clone()
    assert float(scale) == pytest.approx(11 / 255)
    assert float(zero) + quant.low == pytest.approx(-128 + round(3 * 255 / 11) + quant.low, abs=1)
    assert quant.ready
    assert not model.readers["image"].input_quant.ready
    calibrate(model, [100 * torch.randn(4, 2, 4, 4)])
    assert torch.equal(quant.scale, scale)
    assert torch.equal(quant.zero, zero)
    assert model.readers["image"].input_quant.ready


@pytest.mark.parametrize("kind", [ResNet20, MobileNetV2])
def test_a_network_without_data_loses_next_to_nothing(kind):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = kind()
    train(net, 150)
    x, y = digits()

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(F.cross_entropy(model.eval()(x[1500:]), y[1500:]))

    real, other = loss(net), copy.deepcopy(net)
    report = attach(net, CONFIG)
    assert sum("batch normalization" in e.what for e in report.attached) == len(report.attached) - 1  # the image
    assert loss(net) < 1.02 * real
    with torch.no_grad():  # what is promised depends on the parameters: wrong ones would be seen
        for m in other.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight *= 40
                m.bias *= 40
    attach(other, CONFIG)
    ends = [
        [float(m.scale) for n, m in model.named_modules() if n.endswith("input_quant") and m.ready]
        for model in (net, other)
    ]
    assert all(b > 5 * a for a, b in zip(*ends, strict=True) if b < 6 / 255 or a > 6.1 / 255 or kind is ResNet20)


def test_state_is_loaded_over_what_the_norms_say():
    model, other = Paths(), Paths()
    attach(model, CONFIG)
    calibrate(model, [torch.randn(4, 2, 4, 4)])
    with torch.no_grad():
        other.one.weight.fill_(9.0)
    attach(other, CONFIG)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            QuantConfig(method="ste", weight=TensorSpec(8, observer="bn_stats"), activation=None),
            r"weight: observer: expected one that reads weights, got bn_stats. Set it for inputs alone",
        ),
        (
            QuantConfig(method="ste", weight=TensorSpec(8), activation=TensorSpec(8, observer="bn_stats")),
            r"input: observer: expected a static range, got bn_stats with dynamic=True",
        ),
    ],
)
def test_where_it_makes_no_sense(config, match):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=match):
        attach(model, config)


def test_by_itself_it_has_no_ends():
    with pytest.raises(ValueError, match="BnStats: expected ends, which attach reads off a batch normalization"):
        BnStats().range(torch.zeros(1, 3), None)


def test_a_rule_may_ask_for_it():
    rules = (LayerRule(match="2", activation=TensorSpec(8, observer="bn_stats", dynamic=False)),)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    attach(model, QuantConfig(method="ste", weight=TensorSpec(8), activation=None, rules=rules))
    assert model[2].input_quant.ready
    assert isinstance(model[2].input_quant.observer, BnStats)
