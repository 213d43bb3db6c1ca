"""Incremental freezing: which weights, when, that they stay, and what the free ones feel."""

from __future__ import annotations

import pytest
import torch
from torch import nn, tensor

from lightning_quant.estimators.elq import Elq
from lightning_quant.estimators.inq import Inq
from tests.loop import Run, check_folded, check_run, convolutional, mlp, weights_lie_on_their_grid

PHASES = (0.5, 0.75, 0.875, 1.0)
METHODS = [("inq", "w4a16", {}), ("inq", "w4a16-channel", {"grid": "int"}), ("elq", "w1.58a16-channel", {})]


def quant_layers(run):
    return [m for m in run.model if hasattr(m, "weight_quant")]


@pytest.mark.parametrize(("method", "scheme", "options"), METHODS)
def test_training(method, scheme, options):
    run = check_run(lambda: Run(method, scheme, **options), drop=0.75)
    for layer in quant_layers(run):
        assert (layer.weight_quant.held != 0).all()
        assert torch.equal(layer.weight_quant.on_grid(layer.weight), layer.weight)
    assert torch.equal(run.model.train()(run.x), run.evaluate())


@pytest.mark.parametrize("method", ["inq", "elq"])
def test_convolutions_of_both_layouts_train(method):
    run = Run(method, "w4a8-channel", convolutional(), total=16, grid="int").steps(0, 16)
    assert run.losses[-1] < run.losses[0]
    weights_lie_on_their_grid(run.model)
    for layer in quant_layers(run):
        assert torch.equal(layer.weight_quant.on_grid(layer.weight), layer.weight)


@pytest.mark.parametrize(("method", "scheme", "options"), METHODS)
def test_the_largest_are_frozen_first_and_stay(method, scheme, options):
    run = Run(method, scheme, total=8, lr=0.05, **options)
    layer = run.model[0]
    q, n = layer.weight_quant, layer.weight.numel()
    frozen = torch.zeros(layer.weight.shape, dtype=torch.bool)
    for phase, share in enumerate(PHASES):
        before, grid = layer.weight.detach().clone(), q.on_grid(layer.weight)
        run.steps(2 * phase, 2 * phase + 1)
        now = q.held != 0
        count = round(share * n)
        assert now.sum() == count
        free = before.abs().masked_fill(frozen, torch.inf).flatten()
        expected = free.argsort(descending=True, stable=True)[:count]
        assert now.flatten()[expected].all()
        assert torch.equal(layer.weight[now], grid[now])
        run.steps(2 * phase + 1, 2 * phase + 2)
        assert torch.equal(layer.weight[now], grid[now])
        assert share == 1 or not torch.equal(layer.weight[~now], before[~now])
        frozen = now


def test_frozen_weights_have_no_gradient_and_free_ones_all_of_it():
    run = Run("inq", "w4a16", total=8).steps(0, 1)
    layer = run.model[0]
    now = layer.weight_quant.held != 0
    weight = layer.weight.detach().clone()
    weight[~now] *= 100  # beyond the range, which only rounding will notice
    weight.requires_grad_()
    g = torch.randn_like(weight)
    y = layer.weight_quant.train()(weight)
    y.backward(g)
    assert torch.equal(y, weight)
    assert torch.equal(weight.grad, torch.where(now, 0.0, g))


def test_the_scale_stays_while_free_weights_grow():
    run = Run("inq", "w4a16", total=8).steps(0, 1)
    layer = run.model[0]
    scale = layer.weight_quant.scale.clone()
    with torch.no_grad():
        layer.weight[layer.weight_quant.held == 0] = 50.0
    run.steps(1, 8)
    assert torch.equal(layer.weight_quant.scale, scale)
    assert layer.weight.abs().max() <= scale.max() * layer.weight_quant.grid.top


def test_sorting_happens_only_when_the_share_grows(monkeypatch):
    calls = []
    sort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda x, **kw: calls.append(x.numel()) or sort(x, **kw))
    run = Run("inq", "w4a16", total=16)
    run.steps(0, 4)
    assert len(calls) == len(quant_layers(run))
    run.steps(4, 16)
    assert len(calls) == len(PHASES) * len(quant_layers(run))


def test_an_earlier_state_can_be_loaded_into_the_same_run():
    run = Run("inq", "w4a16", total=8)
    start = run.state()
    run.steps(0, 2)
    early = run.losses
    run.losses = []
    run.load(start)
    assert not any((layer.weight_quant.held != 0).any() for layer in quant_layers(run))
    run.steps(0, 8)
    assert run.losses[:2] == early
    assert all((layer.weight_quant.held != 0).all() for layer in quant_layers(run))


def test_codes_of_all_eight_bits_are_kept():
    """256 codes and 'free' do not fit a byte."""
    model = nn.Sequential(nn.Linear(64, 4))
    run = Run("elq", "w8a16-tensor", model, total=1, share=1.0, observer="minmax")
    q = run.model[0].weight_quant
    with torch.no_grad():
        run.model[0].weight.copy_(torch.arange(-128, 128).reshape(4, 64) * q.scale)
    before = run.model[0].weight.detach().clone()
    q.estimator.before_optimizer_step(q, run.model[0].weight)
    assert q.held.dtype == torch.int16
    assert q.held.min() == 1
    assert q.held.max() == 256
    with torch.no_grad():
        run.model[0].weight.normal_()
    q.estimator.project(q, run.model[0].weight)
    assert torch.equal(run.model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_levels_are_exact_in_other_dtypes(dtype):
    run = Run("elq", "w4a16-g8", mlp().to(dtype), total=4, share=1.0)
    layer = run.model[0]
    q = layer.weight_quant
    want = q.on_grid(layer.weight)
    q.estimator.before_optimizer_step(q, layer.weight)
    q.estimator.project(q, layer.weight)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, want)
    assert torch.equal(q.on_grid(layer.weight), want)


@pytest.mark.parametrize("method", ["inq", "elq"])
def test_folded_export(method, tmp_path):
    check_folded(Run(method, "w4a16-channel", total=4).steps(0, 4), tmp_path / "out")


def test_vector_inq():
    """b = 3, s = .9: n1 = 0 and n2 = -1, once for the whole tensor."""
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(tensor([[0.9, -0.4], [0.11, 0.02]]))
    layer = Run("inq", "w3a16", model).model[0]
    assert layer.weight_quant.scale.tolist() == [1.0]
    assert layer.weight_quant.on_grid(layer.weight).tolist() == [[1.0, -0.5], [0.0, 0.0]]


def test_vector_elq():
    """s = .5, b = 2: codes -2..1.  w - Q = .1, -.1, and beyond the range 1.2 - .5 and -2 + 1; frozen: nothing."""
    q = Run("elq", "w2a16-tensor", nn.Sequential(nn.Linear(5, 1)), beta=0.1).model[0].weight_quant
    q.scale.fill_(0.5)
    q.held[0, 4] = 1
    w = tensor([[0.1, 0.4, 1.2, -2.0, 0.3]], requires_grad=True)
    y = q.train()(w)
    assert y[0].tolist() == pytest.approx([0.1, 0.4, 1.2, -2.0, 0.5])
    y.backward(tensor([[2.0, -2.0, 1.0, 1.0, 1.0]]))
    assert w.grad[0].tolist() == pytest.approx([2.2, -2.2, 1.1, 0.9, 0.0])


def test_metrics_tell_the_frozen_share():
    run = Run("inq", "w4a16", total=8).steps(0, 3)
    assert run.controller.metrics()["frozen"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Inq(share=0.5), "inq.share: expected shares in .0, 1. that never fall and end at 1"),
        (lambda: Inq(share={"curve": "linear", "start": 1.0, "end": 0.5}), "inq.share: .*never fall"),
        (lambda: Elq(share={"curve": "linear", "start": -0.5, "end": 1.0}), "elq.share: "),
        (lambda: Elq(beta=-0.1), "elq.beta: expected a number >= 0"),
        (lambda: Run("inq", "w4a16-asym"), "method 'inq': expected symmetric=True"),
        (lambda: Run("inq", "w4a16", learn_scale=True), "method 'inq': expected learn_scale=False"),
        (lambda: Run("elq", "w4a16", grid="nf4"), "method 'elq': expected grid in .'int', 'midrise'."),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
