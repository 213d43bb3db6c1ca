"""LAPQ finds the ranges that are best together, against a search over all of them in numpy."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, TensorSpec, attach
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import AttachError
from lightning_quant.observers.mse import Mse
from lightning_quant.rounding import lapq
from lightning_quant.rounding.lapq import _vertex

LOW, HIGH = -4, 3  # 3 bits


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()


def data(seed=0):
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(activation=None):
    return QuantConfig("ste", TensorSpec(3, granularity="tensor", dynamic=False), activation)


def rounded(w, scale):
    return np.clip(np.round(w / scale), LOW, HIGH) * scale


def distance(scales, weights, x, want):
    """Mean squared error of the output with these two scales, written out."""
    first, second = (rounded(w, s) for w, s in zip(weights, scales, strict=True))
    return float(np.mean((np.maximum(x @ first.T, 0) @ second.T - want) ** 2))


def by_itself(w):
    """The scale of least squared error of one weight."""
    trials = np.linspace(0.05, 1.0, 400) * np.abs(w).max() / HIGH
    return min(trials, key=lambda s: np.sum((rounded(w, s) - w) ** 2))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_scales_come_near_the_best_pair_there_is(seed):
    model, x = net(seed), data(seed)
    weights = [model[i].weight.detach().numpy().copy() for i in (0, 2)]
    want = model(x).detach().numpy()
    trials = [np.linspace(0.3, 1.4, 250) * np.abs(w).max() / HIGH for w in weights]
    layers = [[np.maximum(x.numpy() @ rounded(weights[0], s).T, 0) for s in trials[0]]]
    layers.append([rounded(weights[1], s).T for s in trials[1]])
    best = min(float(np.mean((a @ b - want) ** 2)) for a in layers[0] for b in layers[1])
    alone = distance([by_itself(w) for w in weights], weights, x.numpy(), want)
    assert alone > 1.05 * best  # else there is nothing to find
    attach(model, config())
    report = lapq(model, [x])
    scales = [float(layer.weight_quant.scale) for _, layer in quant_layers(model)]
    assert report.metric == "mse"
    assert report.after == pytest.approx(distance(scales, weights, x.numpy(), want), rel=1e-5)
    assert report.after < best + 0.35 * (alone - best)  # a local search on a rough surface
    assert report.after < min(report.before, report.layerwise)
    with torch.no_grad():
        assert float((model.eval()(x) - torch.as_tensor(want)).square().mean()) == pytest.approx(report.after, rel=1e-5)


def test_powers_of_the_norm():
    """p = 1 and p = 4 against a search written out; more weight on large errors keeps the range wider."""
    rows = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)).double()
    attach(model := net(), config())
    grid = model[0].weight_quant.grid
    wide = []
    for power in (1.0, 2.0, 4.0):
        _, high = Mse(candidates=200, power=power).range(rows, grid)
        for row, end in zip(rows.numpy(), high, strict=True):
            ends = [row.max() * (1 - 0.8 * i / 199) for i in range(200)]
            lows = [row.min() * (1 - 0.8 * i / 199) for i in range(200)]
            scales = [float(grid.scale(torch.tensor(max(-lo, hi)))) for lo, hi in zip(lows, ends, strict=True)]
            errors = [np.sum(np.abs(rounded(row, s) - row) ** power) for s in scales]
            assert float(end) == pytest.approx(ends[int(np.argmin(errors))], rel=1e-5)
        wide.append(float(high[0]))
    assert wide[0] < wide[1] < wide[2]


def test_the_vertex_of_a_parabola():
    assert _vertex({p: 3 * (p - 2.7) ** 2 + 1 for p in (2.0, 2.5, 3.0, 3.5)}) == pytest.approx(2.7)
    assert _vertex({2.0: 1.0, 3.0: 2.0, 4.0: 1.5}) == 2.0  # opens downwards
    assert _vertex({2.0: 3.0, 3.0: 2.0, 4.0: float("inf")}) == 3.0
    assert _vertex({p: (p - 9) ** 2 for p in (2.0, 3.0, 4.0)}) == 4.0  # not beyond what was tried


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_too_and_their_training_goes_on_from_there(symmetric):
    model, x = net().float(), data().float()
    spec = TensorSpec(3, symmetric=symmetric, granularity="tensor", dynamic=False)
    attach(model, config(spec))
    report = lapq(model, [x[:32], x[32:]])
    assert report.ranges == 4
    assert report.after < 0.9 * report.before
    for _, q in quantizers(model):
        assert q.ready
        assert not q.observing
        if not q.is_weight:
            own = q.grid.scale_and_zero(q.running[:1], q.running[1:])[0]
            assert torch.equal(own, q.scale)


class Labelled(nn.Module):
    """Returns its loss where it gets labels."""

    def __init__(self):
        super().__init__()
        self.body = net().float()

    def forward(self, x, labels=None):
        logits = self.body(x)
        return Output(nn.functional.cross_entropy(logits, labels) if labels is not None else None, logits)


class Output(NamedTuple):
    loss: torch.Tensor | None
    logits: torch.Tensor


def test_metrics():
    x = data().float()
    y = Labelled()(x).logits.argmax(1)
    found = {}
    for metric, batch in ((None, {"x": x, "labels": y}), ("kl", {"x": x}), ("mse", {"x": x}), ("loss", {"x": x})):
        attach(model := Labelled(), config())
        if metric == "loss":
            with pytest.raises(ValueError, match=r"lapq\(metric='loss'\): expected a model that returns its loss"):
                lapq(model, [batch], metric=metric)
            continue
        report = lapq(model, [batch], metric=metric)
        found[report.metric] = report
        assert report.after < report.before
    assert list(found) == ["loss", "kl", "mse"]


def test_no_more_evaluations_than_allowed_and_never_worse():
    for budget in (6, 8, 30):
        attach(model := net(), config())
        report = lapq(model, [data()], evaluations=budget)
        assert report.evaluations == budget
        assert report.after <= min(report.before, report.layerwise)
        assert report.summary().startswith("lapq: 2 ranges, mse ")


def test_a_scale_per_channel_keeps_its_proportions():
    model = net()
    attach(model, QuantConfig("ste", TensorSpec(3, granularity="channel", dynamic=False), None))
    before = {path: layer.weight_quant.scale.clone() for path, layer in quant_layers(model)}
    lapq(model, [data()])
    for path, layer in quant_layers(model):
        assert len(before[path]) == len(layer.weight_quant.scale) > 1
        assert not torch.equal(before[path], layer.weight_quant.scale)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"iterations": 0}, "lapq: expected iterations >= 1"),
        ({"evaluations": 5}, "more evaluations than powers, got iterations=2, evaluations=5"),
        ({"powers": (2, 3)}, "3 powers or more"),
        ({"metric": "ml"}, "lapq: expected one of kl, loss, mse, got 'ml'"),
    ],
)
def test_settings_that_make_no_sense(settings, match):
    attach(model := net(), config())
    with pytest.raises(ValueError, match=match):
        lapq(model, [data()], **settings)


def test_ranges_that_follow_the_tensor_are_refused():
    model = net()
    attach(model, QuantConfig.parse("ste", "w8a8"))
    with pytest.raises(AttachError, match="lapq: expected a static range, got ranges that follow each tensor"):
        lapq(model, [data()])
    with pytest.raises(ValueError, match="at least one batch"):
        lapq(model, [])
