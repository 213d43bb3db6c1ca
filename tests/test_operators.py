"""Operands of additions, concatenations and averages on a grid, whatever module writes them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_quant import QuantConfig, QuantController, attach, calibrate, detach
from lightning_quant.attach import check_coverage, quantizers
from lightning_quant.errors import AttachError
from tests.convnets import Basic, Inverted, MobileNetV2, ResNet20, digits, train


def config(scheme: str = "w8a8-static", **settings: object) -> QuantConfig:
    return QuantConfig.parse("ste", scheme, **{"operators": 8, **settings})


def operands(net: nn.Module) -> set[str]:
    return {path for path, _ in quantizers(net) if not path.endswith((".weight_quant", ".input_quant"))}


class Net(nn.Module):
    """One convolution and whatever ``body`` does with what it returns."""

    def __init__(self, body, shape=(2, 3, 6, 6)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.body, self.shape = body, shape

    def forward(self, x):
        return self.body(self.conv(x), x)


OPERATIONS = {
    "+": (lambda a, b: a + b, lambda q, a, b: q(a) + q(b)),
    "torch.add": (torch.add, lambda q, a, b: q(a) + q(b)),
    ".add_": (lambda a, b: a.relu().add_(b), lambda q, a, b: q(a.relu()) + q(b)),
    "twice": (lambda a, b: a + a, lambda q, a, b: q(a) + q(a)),
    "cat": (lambda a, b: torch.cat([a, b], 1), lambda q, a, b: torch.cat([q(a), q(b)], 1)),
    "mean": (lambda a, b: a.mean([2, 3]), lambda q, a, b: q(a).mean([2, 3])),
    "avg_pool2d": (lambda a, b: F.avg_pool2d(a, 2), lambda q, a, b: F.avg_pool2d(q(a), 2)),
    "adaptive": (lambda a, b: F.adaptive_avg_pool2d(a, 1), lambda q, a, b: F.adaptive_avg_pool2d(q(a), 1)),
    "sizes": (
        lambda a, b: (a + b).reshape(a.shape[0] + b.size(0) - a.shape[0], -1),
        lambda q, a, b: (q(a) + q(b)).reshape(b.size(0), -1),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operands_of_one_operation_share_one_range(name):
    torch.manual_seed(0)
    body, want = OPERATIONS[name]
    net, x = Net(body), torch.randn(2, 3, 6, 6)
    attach(net, config())
    outputs = []
    net.conv.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    calibrate(net, [x])
    (path,) = operands(net)
    quantizer = net.get_submodule(path)
    (y,) = outputs
    seen = [y, x] if name in ("+", "torch.add", "cat", "sizes") else [y.relu(), x] if name == ".add_" else [y]
    low, high = min(float(t.min()) for t in seen), max(float(t.max()) for t in seen)
    assert quantizer.running.tolist() == pytest.approx([low, high])
    got = net(x)
    assert torch.equal(got, want(quantizer, outputs[1], x))


def test_numbers_and_constants_are_left_alone():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.shift = nn.Conv2d(3, 3, 1), nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, x):
            return self.conv(x) + 1 + self.shift

    net = Shift()
    attach(net, config())
    assert operands(net) == set()
    assert type(net) is Shift


def test_usual_networks():
    net = ResNet20(width=4)
    report = attach(net, config())
    assert operands(net) == {f"blocks.{i}.add_quant" for i in range(9)}
    assert {e.path for e in report.attached if e.what.startswith("a8")} == {"pool", *(f"blocks.{i}" for i in range(9))}
    assert all(isinstance(block, Basic) for block in net.blocks)
    net = MobileNetV2()
    attach(net, config())
    assert operands(net) == {"features.3.add_quant", "features.5.add_quant", "mean_quant"}
    assert isinstance(net.features[3], Inverted)
    assert set(net.features[4].__dict__) == set(Inverted(8, 16, 2, 3).__dict__)  # no shortcut, nothing to quantize


def test_modules_of_one_class_and_one_graph_share_a_class():
    net = ResNet20(width=4)
    attach(net, config())
    assert len({type(b) for b in net.blocks}) == 2  # with and without a downsampling branch


@pytest.mark.parametrize("make", [ResNet20, MobileNetV2])
def test_trains_copies_pickles_and_comes_apart(make):
    torch.manual_seed(0)
    net = make(width=4)
    born = [type(m) for m in net.modules()]
    keys = set(net.state_dict())
    control = QuantController(config(batch_norm="two_pass", calibration=4))
    control.prepare(net)
    control.begin(30)
    losses = train(net, 30, control=control)
    assert sum(losses[-5:]) < sum(losses[:5])
    x = digits()[0][:16]
    want = net.eval()(x)
    check_coverage(net, "error", "evaluation")
    assert torch.equal(copy.deepcopy(net)(x), want)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), want)
    assert [type(m).__name__ for m in loaded.modules()] == [type(m).__name__ for m in net.modules()]
    plain = detach(net)
    assert [type(m) for m in plain.modules()] == born
    assert set(plain.state_dict()) == keys


class Dropping(nn.Module):
    """Reads its mode while it runs, has an argument with a default, and adds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, factor=1.0, mask=None):
        y = F.dropout(self.conv(x), 0.5, self.training)
        if mask is not None:
            y = y * mask
        return factor * y + x


def test_mode_and_defaults_survive_tracing():
    torch.manual_seed(0)
    net, x = Dropping(), torch.randn(2, 3, 4, 4)
    attach(net, config())
    calibrate(net, [x])
    assert torch.equal(net.eval()(x), net(x))
    assert not torch.equal(net.train()(x), net(x))
    with pytest.raises(AssertionError, match="mask"):
        net(x, mask=torch.ones(1))


class Branches(nn.Module):
    """Decides on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) + x if x.sum() > 0 else x


class Metric(nn.Module):
    """Not part of the model's function: nothing to train, nothing that traces."""

    def forward(self, x):
        return float(x.sum()) + 1


def test_forward_that_cannot_be_traced_is_reported_and_refused_when_strict():
    report = attach(nn.Sequential(nn.Conv2d(3, 3, 1), Branches()), config())
    ((path, reason),) = [(e.path, e.what) for e in report.unsupported]
    assert path == "1"
    assert reason.startswith("torch.fx cannot trace its forward (TraceError")
    assert reason in str(report)
    strict = nn.Sequential(nn.Conv2d(3, 3, 1), Branches())
    with pytest.raises(AttachError, match=r"expected weights and operators that can all be reached, got 1 "):
        attach(strict, config(strict=True))
    assert type(strict[0]) is nn.Conv2d
    fine = Net(torch.add)
    fine.metric = Metric()
    assert not attach(fine, config()).unsupported
    assert operands(fine) == {"add_quant"}


def test_off_unless_asked_for():
    for settings in ({"operators": None}, {"scheme": "w8a16"}):
        net = ResNet20(width=4)
        attach(net, config(**settings))
        assert operands(net) == set()


def test_values_that_are_only_moved_or_clipped_are_not_rounded_on_the_way():
    """conv, norm, ReLU, max-pool, padding: the next layer reads the range after all of them, which starts at 0."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Conv2d(4, 2, 3)
    )
    attach(net, config(batch_norm="frozen"))
    calibrate(net, [digits()[0][:32]])
    assert {path for path, _ in quantizers(net)} == {
        f"{i}.{n}" for i in (0, 5) for n in ("weight_quant", "input_quant")
    }
    reader = net[5].input_quant
    assert float(reader.running[0]) == 0.0
    assert float(reader.zero) == reader.low


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph():
    torch.manual_seed(0)
    net, x = ResNet20(width=4, depth=1), digits()[0][:8]
    attach(net, config(batch_norm="frozen"))
    calibrate(net, [x])
    want = net.train()(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), want)
