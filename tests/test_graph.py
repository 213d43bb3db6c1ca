"""What torch.fx finds in a model, and the rule for first and last layers that rests on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_quant import LayerRule, QuantConfig, TensorSpec, attach
from lightning_quant.attach import quant_layers
from lightning_quant.errors import AttachError
from lightning_quant.graph import flow, followers, outermost
from tests.convnets import MobileNetV2, ResNet20


def layers(net: nn.Module) -> set[str]:
    return {path for path, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


@pytest.mark.parametrize(
    ("net", "first", "last"),
    [
        (ResNet20(width=4), {"conv"}, {"head"}),
        (MobileNetV2(width=4), {"features.0"}, {"classifier.1"}),
        (nn.Sequential(nn.Linear(2, 2)), {"0"}, {"0"}),
    ],
)
def test_outermost_layers(net, first, last):
    assert outermost(flow(net), layers(net)) == (first, last)


class Towers(nn.Module):
    """Two inputs, two outputs, defined in an order that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.out_b, self.out_a = (nn.Linear(4, 4) for _ in range(3))
        self.in_b, self.in_a = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a, b):
        mixed = self.middle(torch.relu(self.in_a(a)) + self.in_b(b))
        return self.out_a(mixed), self.out_b(mixed)


def test_several_inputs_and_outputs():
    net = Towers()
    assert outermost(flow(net), layers(net)) == ({"in_a", "in_b"}, {"out_a", "out_b"})
    assert outermost(flow(net), {"middle", "out_a"}) == ({"middle"}, {"out_a"})


class Holder(nn.Module):
    """Steps only, as many a LightningModule; the net inside traces."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Towers()


def test_the_largest_parts_that_trace_are_read():
    found = flow(Holder())
    assert set(found.parts) == {"net"}
    assert found.failures == {}
    assert outermost(found, {f"net.{p}" for p in layers(Towers())})[0] == {"net.in_a", "net.in_b"}


def test_reused_modules_are_no_pairs():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.b(self.norm(self.a(x))))

    net = Reused()
    is_layer, is_norm = (lambda m: isinstance(m, nn.Linear)), (lambda m: isinstance(m, nn.BatchNorm1d))
    assert followers(net, flow(net), is_layer, is_norm) == {}
    chain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    assert followers(chain, flow(chain), is_layer, is_norm) == {"0": "1"}


def bits(net: nn.Module) -> dict[str, tuple[float, bool]]:
    return {p: (layer.weight_quant.spec.bits, layer.input_quant is not None) for p, layer in quant_layers(net)}


def test_first_and_last_layers_have_a_scheme_of_their_own():
    net = Towers()
    attach(net, QuantConfig.parse("ste", "w2a2-tensor-static", first_last="w8a8-static"))
    widths = {p: layer.input_quant.spec.bits for p, layer in quant_layers(net)}
    assert widths == {"in_a": 8, "in_b": 8, "out_a": 8, "out_b": 8, "middle": 2}
    assert bits(net)["in_a"] == (8, True)


def test_first_and_last_layers_in_float_are_reported():
    net = Towers()
    report = attach(net, QuantConfig.parse("ste", "w2a16-tensor", first_last=None))
    assert bits(net) == {"middle": (2, False)}
    assert {(e.path, e.what) for e in report.excluded} == {
        (p, "first or last layer") for p in ("in_a", "in_b", "out_a", "out_b")
    }


def test_rules_go_before_the_rule_for_first_and_last():
    net = Towers()
    rules = [LayerRule("in_a", weight=TensorSpec(4, granularity="tensor")), LayerRule("out_b", weight=None)]
    attach(net, QuantConfig.parse("ste", "w2a16-tensor", first_last="w8a16", rules=rules))
    assert bits(net) == {"in_a": (4, False), "in_b": (8, False), "middle": (2, False), "out_a": (8, False)}


class Branches(nn.Module):
    """torch.fx cannot follow: the order of definition decides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x))) if x.sum() > 0 else x


def test_order_of_definition_where_nothing_traces():
    net = Branches()
    attach(net, QuantConfig.parse("ste", "w2a16-tensor", first_last="w8a16"))
    assert bits(net) == {"a": (8, False), "b": (2, False), "c": (8, False)}


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_weights_nothing_reaches_are_listed_with_their_share_and_refused_when_strict(kind):
    held = nn.MultiheadAttention(16, 2) if kind == "attention" else nn.LSTM(16, 16)
    net = nn.ModuleDict({"body": held, "out": nn.Linear(16, 4)})
    total = sum(p.numel() for p in net.parameters())
    report = attach(net, QuantConfig.parse("ste", "w8a16"))
    shares = {e.path: e.share for e in report.unsupported}
    weights = {f"body.{n}": p.numel() / total for n, p in held.named_parameters() if p.ndim > 1}
    assert shares == pytest.approx(weights)
    for path, share in weights.items():
        assert path in str(report)
        assert f"{share:.1%}" in str(report)
    strict = nn.ModuleDict({"body": held, "out": nn.Linear(16, 4)})
    message = rf"expected weights and operators .* got .*body\..* \({max(weights.values()):.1%}\).*strict=False"
    with pytest.raises(AttachError, match=message):
        attach(strict, QuantConfig.parse("ste", "w8a16", strict=True))
    assert type(strict["out"]) is nn.Linear
