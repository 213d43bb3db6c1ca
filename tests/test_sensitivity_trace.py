"""The Hessian's trace: Hutchinson's estimate against the exact second derivatives, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from lightning_quant import QuantConfig, attach, detach
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.sensitivity import sensitivity
from lightning_quant.sensitivity.trace import Trace, traces


class Net(nn.Module):
    """A convolution, a layer that runs twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).flatten(1)
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def net_and_batches() -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    net = Net().double()
    return net, [(torch.randn(8, 1, 4, 4).double(), torch.randint(0, 3, (8,))) for _ in range(2)]


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def exact(net: nn.Module, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
    """All second derivatives of a weight, (n, n)."""

    def value(weight: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, {name: weight}, (batch[0],)), batch[1])

    weight = dict(net.named_parameters())[name].detach()
    return hessian(value, weight).reshape(weight.numel(), -1)


def diagonal(net: nn.Module, batches: list, name: str) -> float:
    return float(torch.stack([exact(net, b, name).diagonal().mean() for b in batches]).mean())


def switched_off(net: nn.Module) -> dict:
    attach(net, QuantConfig.parse("ste", "w4a16-channel"))
    for _, q in quantizers(net):
        q.enabled = False
    return dict(quant_layers(net))


@pytest.mark.parametrize("path", ["conv", "twice", "head"])
def test_a_probe_is_the_quadratic_form_of_the_exact_hessian(path):
    net, batches = net_and_batches()
    blocks = [exact(net, batch, f"{path}.weight") for batch in batches]
    layer = switched_off(net)[path]
    found = traces({path: layer}, lambda b: loss(net, b), batches, probes=3, seed=5)[path]
    draw = torch.Generator().manual_seed(5)
    values = []
    for block in blocks:
        for _ in range(3):
            v = torch.randint(0, 2, layer.weight.shape, generator=draw, dtype=torch.int8).double().flatten() * 2 - 1
            values.append(v @ block @ v / len(v))
    values = torch.stack(values)
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert found.error == pytest.approx(float(values.std() / 6**0.5), rel=1e-9)


def test_the_mean_of_many_probes_is_the_exact_trace():
    net, batches = net_and_batches()
    want = {path: diagonal(net, batches, f"{path}.weight") for path in ("conv", "twice", "head")}
    found = traces(switched_off(net), lambda b: loss(net, b), batches, probes=1000)
    for path, trace in found.items():
        assert abs(trace.mean - want[path]) < 3 * trace.error, path
        assert trace.error < 0.2 * abs(want[path]), path


def test_a_diagonal_hessian_needs_one_probe():
    """y = w . x with one-hot x and a squared loss: the second derivative is 2/n for each weight, whatever the signs."""
    net = nn.Sequential(nn.Linear(5, 1, bias=False)).double()
    layers = switched_off(net)
    x = torch.eye(5).double()
    found = traces(layers, lambda b: net(b).square().mean(), [x], probes=3)
    assert found["0"].mean == pytest.approx(2 / 5)
    assert found["0"].error == pytest.approx(0, abs=1e-12)
    found = traces(layers, lambda b: net(b).sum(), [x], probes=2)
    assert found["0"] == Trace(0.0, 0.0)  # a straight line has no curvature


def test_the_measure_is_the_trace_times_the_squared_error():
    net, batches = net_and_batches()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.head.weight.requires_grad_(False)  # a frozen layer is measured as well
    schemes = ("w2a16-channel", "w4a16-channel", "w8a16")
    found = sensitivity(net.train(), batches, schemes, "hessian", loss=loss, probes=50)
    assert net.training
    assert not net.head.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for group, losses in zip(found.groups, found.losses, strict=True):
        row = found.details[group[0]]
        rounded = Net().double()
        rounded.load_state_dict(before)
        attach(rounded, QuantConfig.parse("ste", schemes[0]))
        detach(rounded, fold=True)
        error = (rounded.get_submodule(group[0]).weight - before[f"{group[0]}.weight"]).square().sum()
        assert row["error"][0] == pytest.approx(float(error.detach()), rel=1e-6)
        assert losses == pytest.approx([max(row["trace"], row["spread"]) * e for e in row["error"]])
        assert losses[0] > losses[1] > losses[2] > 0
        assert abs(row["trace"] - diagonal(net, batches, f"{group[0]}.weight")) < 3 * row["spread"]
    assert "+-" in str(found)


def test_a_trace_below_its_error_counts_with_it():
    """A saddle: half of the curvature is negative, and the layer is not taken to gain from being rounded."""
    net = nn.Sequential(nn.Linear(4, 2, bias=False))
    signs = torch.tensor([1.0, -1.0])
    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = sensitivity(
        net, data, ("w2a16-channel",), "hessian", loss=lambda m, x: (signs * m(x).square()).sum(1).mean(), probes=4
    )
    row = found.details["0"]
    assert abs(row["trace"]) <= row["spread"]
    assert found.losses[0][0] == pytest.approx(row["spread"] * row["error"][0])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class Cut(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


class Hidden(nn.Sequential):
    """Its parameters are not in the graph of its output, though the output has one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach() + x.requires_grad_()


def test_what_cannot_be_differentiated_twice_is_refused():
    net = Cut(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"measure 'hessian': expected a model that can be differentiated twice"):
        sensitivity(net, [torch.randn(4, 8)], ("w4a16-channel",), "hessian", loss=lambda m, x: m(x).square().mean())
    assert type(net[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"a loss that depends on the weights, got one that does not"):
        sensitivity(net, [torch.randn(4, 8)], ("w4a16-channel",), "hessian", loss=lambda m, x: m(x).detach().sum())
    hidden = Hidden(nn.Linear(8, 8), nn.Tanh())
    with pytest.raises(ValueError, match=r"got no weight is in the loss's graph"):
        sensitivity(hidden, [torch.randn(4, 8)], ("w4a16-channel",), "hessian", loss=lambda m, x: m(x).square().sum())
    with pytest.raises(ValueError, match=r"probes: expected 2 or more, got 1"):
        sensitivity(net, [torch.randn(4, 8)], measure="hessian", probes=1)
