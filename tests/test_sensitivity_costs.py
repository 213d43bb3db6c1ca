"""What budgets limit: bits, bytes, bit operations and seconds, counted and chosen within."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_quant import LayerRule, QuantConfig, TensorSpec, attach
from lightning_quant.attach import quant_layers
from lightning_quant.sensitivity import Budget, read_seconds, sensitivity
from lightning_quant.sensitivity.budgets import describe, held_bytes, stored_bits
from lightning_quant.sensitivity.traffic import watch
from tests.convnets import MobileNetV2, ResNet20


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4.5bits", "bits", 4.5),
        (4, "bits", 4),
        ("120MiB", "bytes", 120 * 2**20),
        ("1.5 gb", "bytes", 1.5e9),
        ("4096 bytes", "bytes", 4096),
        ("12GBOPs", "bops", 12e9),
        ("3ms", "seconds", 0.003),
        ("2e-3s", "seconds", 0.002),
        ("7us", "seconds", 7e-6),
    ],
)
def test_budgets(text, kind, value):
    assert Budget.parse(text) == Budget(kind, pytest.approx(value))
    assert Budget.parse(str(Budget.parse(text)).removesuffix(" per sample").removesuffix(" per weight")) == Budget(
        kind, pytest.approx(value, rel=1e-3)
    )


@pytest.mark.parametrize("text", ["4.5", "bits", "4 parsecs", "1.2.3bits", "-3ms"])
def test_budgets_without_a_meaning(text):
    with pytest.raises(ValueError, match=r"budget: expected a number and a unit, such as 4\.5bits, 120MiB, 12GBOPs"):
        Budget.parse(text)


def test_budgets_of_nothing():
    with pytest.raises(ValueError, match=r"budget: expected a number above 0, got '0ms'"):
        Budget.parse("0ms")
    with pytest.raises(ValueError, match=r"expected a number above 0"):
        Budget.parse(float("nan"))


def test_amounts_in_words():
    assert describe("bits", 4.125) == "4.125 bits per weight"
    assert describe("bytes", 1000) == "1000 bytes"
    assert describe("bops", 1.2e13) == "12 TBOPs per sample"
    assert describe("seconds", 2e-7) == "0.2 us"


# Operations


class Everything(nn.Module):
    """Layers of every kind whose products are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.larger = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.sound = nn.Conv1d(6, 4, 5, stride=3)
        self.volume = nn.Conv3d(1, 2, 2)
        self.rows = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.larger(self.depthwise(torch.relu(self.image(x))))
        y = self.rows(self.rows(x.flatten(2).mT)).mT  # one layer, two calls
        return self.volume(self.sound(y).unsqueeze(1).unsqueeze(1).expand(-1, -1, 2, -1, -1)).sum()


@pytest.mark.parametrize(
    ("make", "shape"), [(Everything, (2, 3, 8, 8)), (ResNet20, (2, 1, 8, 8)), (MobileNetV2, (3, 1, 8, 8))]
)
def test_multiplications_are_those_that_torch_counts(make, shape):
    model, x = make().eval(), torch.randn(shape)
    with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter:
        model(x)
    counts = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    attach(model, QuantConfig.parse("ste", "w8a16"))
    found = watch(model, lambda: model(x))
    assert set(found.macs) == {p for p, _ in quant_layers(model)}
    for path, macs in found.macs.items():
        assert 2 * macs == counts[f"{root}.{path}"], path


def test_experts_multiply_once_for_each_place_of_the_routing_table():
    from tests.test_experts import IDS, build

    model = build()
    attach(model, QuantConfig.parse("ste", "w4a16-g16"))
    found = watch(model, lambda: model(input_ids=IDS))
    places = IDS.numel() * 2
    assert found.macs["model.layers.0.mlp.experts.gate_up_proj_quant"] == places * 96 * 32
    assert found.macs["model.layers.0.mlp.experts.down_proj_quant"] == places * 32 * 48
    assert found.macs["model.layers.0.self_attn.q_proj"] == IDS.numel() * 32 * 32
    assert found.rows["model.layers.0.self_attn.q_proj"] == IDS.numel()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


DATA = [torch.randn(4, 64, generator=torch.Generator().manual_seed(1))]


def test_bit_operations_by_hand_within_a_budget():
    rules = [LayerRule("4", weight=None)]
    found = sensitivity(mlp(), DATA, ("w2a4-channel", "w4a4-channel", "w8a8"), "mse", QuantConfig("ste", rules=rules))
    assert found.groups == [("0",), ("2",)]
    assert found.bops == [[64 * 32 * b for b in (8, 16, 64)], [32 * 32 * b for b in (8, 16, 64)]]  # per row
    assert found.rest["bops"] == 32 * 10 * 16 * 16  # in float
    most = 64 * 32 * 16 + 32 * 32 * 16 + 32 * 10 * 256
    recipe = found.recipe(f"{most / 1e3}kBOPs")
    assert recipe.costs["bops"] <= most
    assert list(recipe.schemes.values()) == ["w4a4-channel", "w4a4-channel"]
    with pytest.raises(ValueError, match=r"got 100 kBOPs per sample\. Raise") as error:
        found.recipe("100kBOPs")
    assert "expected 106.5 kBOPs per sample (81.92 kBOPs per sample of it in what is not chosen for) or more" in str(
        error.value
    )


# Sizes


def test_stored_bits_by_hand():
    cases = {
        "w4a16-g32": 64 * 4 + 2 * 16,
        "w2a16-g64": 64 * 2 + 16,
        "w4a16-g32-asym": 64 * 4 + 2 * (16 + 4),
        "w8a16": 64 * 8 + 16,
        "mxfp4a16": 64 * 4 + 2 * 8,
        "nvfp4a16": 64 * 4 + 4 * 8,
        "w1.58a16-channel": 64 * 1.58 + 16,
    }
    for scheme, bits in cases.items():
        net = nn.Sequential(nn.Linear(64, 10))
        attach(net, QuantConfig.parse("ste", scheme))
        assert stored_bits(net[0]) == pytest.approx(10 * bits), scheme


def test_bytes_of_everything_else_count_each_tensor_once():
    net = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 7, bias=False)).half()
    net[3].weight = net[0].weight
    net[1].register_buffer("scratch", torch.zeros(1000), persistent=False)
    attach(net, QuantConfig.parse("ste", "w4a16-channel", rules=[LayerRule("3", weight=None)]))
    layers = [layer for _, layer in quant_layers(net)]
    assert [layer is net[1] for layer in layers] == [True]
    assert held_bytes(net, layers) == 2 * (7 * 8 + 8 + 4 * 8) + 8  # table, bias, norm, and its counter


def test_a_size_is_the_whole_models():
    found = sensitivity(mlp(), DATA, ("w2a16-g32", "w4a16-g32", "w8a16"), "sqnr")
    rest = 4 * (32 + 32 + 10)
    assert found.rest["bytes"] == rest
    middle = sum(row[1] for row in found.bits) / 8 + rest
    recipe = found.recipe(f"{middle} bytes")
    assert recipe.costs["bytes"] <= middle
    weights = 64 * 32 + 32 * 32 + 32 * 10
    assert recipe.costs["bits"] == pytest.approx((recipe.costs["bytes"] - rest) * 8 / weights)
    assert recipe.loss <= sum(row[1] for row in found.losses)
    with pytest.raises(
        ValueError, match=r"1\.324 KiB \(296 bytes of it in what is not chosen for\) or more, got 1 KiB"
    ):
        found.recipe("1KiB")


def test_layers_that_have_a_scheme_of_their_own_keep_it():
    rules = [LayerRule("2", weight=TensorSpec(3, granularity="channel")), LayerRule("4", activation=None)]
    config = QuantConfig("ste", rules=rules, target="transformers")
    found = sensitivity(mlp(), DATA, ("w4a8-channel", "w8a16"), "sqnr", config)
    assert found.groups == [("0",), ("4",)]
    assert found.rest["bytes"] == 4 * (32 + 32 + 10) + 32 * (32 * 3 + 16) / 8
    assert found.rest["bops"] in (32 * 32 * 3 * 8, 32 * 32 * 3 * 16)
    mixed = found.recipe(5.0).config(config)
    model = mlp()
    attach(model, mixed)
    by_path = dict(quant_layers(model))
    assert by_path["2"].weight_quant.spec.bits == 3
    assert by_path["4"].input_quant is None
    assert found.details["4"]["input"] == [float("inf")] * 2
    ends = QuantConfig.parse("ste", "w4a8-channel", first_last="w8a8")
    assert sensitivity(mlp(), DATA, ("w4a8-channel", "w2a8-channel"), "sqnr", ends).groups == [("2",)]
    with pytest.raises(ValueError, match="a layer whose scheme is open, got none"):
        sensitivity(mlp(), DATA, ("w8a16", "w8a16-channel"), "sqnr")


# Latency

SCHEMES = ("w4a16-g32", "w8a16")
TABLE = {"0": {"w4a16-g32": 1e-3, "w8a16": 2e-3}, "*": {"w4a16-g32": 5e-4, "w8a16": 7e-4}}


def test_seconds_from_a_file(tmp_path):
    file = tmp_path / "seconds.json"
    file.write_text(json.dumps(TABLE))
    found = sensitivity(mlp(), DATA, SCHEMES, "mse", latency=read_seconds(file))
    assert found.seconds == [[1e-3, 2e-3], [5e-4, 7e-4], [5e-4, 7e-4]]
    recipe = found.recipe("2.4ms")
    assert recipe.costs["seconds"] == pytest.approx(2.4e-3)
    assert recipe.schemes == {"0": "w4a16-g32", "2": "w8a16", "4": "w8a16"}
    assert "2.4 ms" in str(recipe)
    with pytest.raises(ValueError, match=r"budget: expected 2 ms or more, got 1 ms"):
        found.recipe("1ms")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[1]", "seconds for each layer and scheme, got another form"),
        ('{"0": 1}', "seconds for each layer and scheme, got another form"),
        ('{"0": {"w8a16": "fast"}}', "0, w8a16: expected a number of seconds, got 'fast'"),
        ('{"0": {"w8a16": -1}}', "expected a number of seconds, got -1"),
    ],
)
def test_files_that_are_no_table(tmp_path, text, message):
    (tmp_path / "seconds.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_seconds(tmp_path / "seconds.json")


def test_tables_that_lack_something():
    with pytest.raises(ValueError, match=r"latency of 2: expected seconds for this layer, got none in the table"):
        sensitivity(mlp(), DATA, SCHEMES, latency={"0": TABLE["0"], "4": TABLE["0"]})
    with pytest.raises(ValueError, match=r"latency of 0: expected seconds for every scheme, got none for w8a16"):
        sensitivity(mlp(), DATA, SCHEMES, latency={"*": {"w4a16-g32": 1.0}})
    with pytest.raises(ValueError, match=r"latency: expected 'measure' or a table of seconds, got 'guess'"):
        sensitivity(mlp(), DATA, SCHEMES, latency="guess")
    with pytest.raises(ValueError, match=r"budget 3 ms: expected the layers' latencies, got none"):
        sensitivity(mlp(), DATA, SCHEMES).recipe("3ms")


def test_seconds_on_the_kernels_of_this_machine():
    net = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 4096))
    x = [torch.randn(2, 512)]
    found = sensitivity(net, x, SCHEMES, "sqnr", latency="measure", rows=1)
    assert all(0 < s < 1 for row in found.seconds for s in row)
    assert found.seconds[0] == found.seconds[1]  # of one shape, timed once
    assert all(large > small for large, small in zip(found.seconds[2], found.seconds[0], strict=True))
    allowed = sum(max(row) for row in found.seconds)
    assert found.recipe(Budget("seconds", allowed)).costs["seconds"] <= allowed
    assert type(net[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"latency of 0: .*kernels for, got QuantConv2d is no Linear.*--latency FILE"):
        sensitivity(nn.Sequential(nn.Conv2d(1, 2, 3)), [torch.randn(1, 1, 5, 5)], ("w8a16",), latency="measure")
