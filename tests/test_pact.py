"""PACT: published values, the bound in training, its decay, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn, tensor

from lightning_quant.attach import attach, quantizers
from lightning_quant.controller import QuantController
from lightning_quant.estimators.pact import Pact, PactWeights
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig
from tests.loop import Run, check_folded, check_run, convolutional
from tests.oracle import pact as paper


def input_quantizer(bits=2, alpha=6.0, **options):
    rule = Pact(**options).role(False)
    spec = resolve_activation(TensorSpec(bits), False, rule)
    q = FakeQuantizer(spec, Granularity("tensor", None), rule, channels=4, dtype=torch.float64)
    q.set_range(tensor([0.0]), tensor([alpha]))
    if "lam" in q._buffers:
        q.lam.fill_(options["decay"])
    return q


@pytest.mark.parametrize(
    ("x", "y", "dx", "dalpha"), [(0.7, 0.0, 1, 0), (2.0, 2.0, 1, 0), (7.0, 6.0, 0, 1), (-1.0, 0.0, 0, 0)]
)
def test_inputs(x, y, dx, dalpha):
    assert paper.inputs(x, 6.0, 2) == (y, dx, dalpha)
    q = input_quantizer()
    at = tensor([[x]], dtype=torch.float64, requires_grad=True)
    out = q(at)
    out.sum().backward()
    assert (out.item(), at.grad.item(), q.upper.grad.item()) == (pytest.approx(y), dx, pytest.approx(dalpha))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_inputs_and_bound_by_the_paper_s_formulas(bits):
    q = input_quantizer(bits, alpha=1.3)
    x = torch.randn(50, 4, dtype=torch.float64).requires_grad_()
    g = torch.randn(50, 4, dtype=torch.float64)
    y = q(x)
    y.backward(g)
    want = tensor([paper.inputs(v, 1.3, bits) for v in x.flatten().tolist()], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), want[:, 0])
    torch.testing.assert_close(x.grad.flatten(), g.flatten() * want[:, 1])
    torch.testing.assert_close(q.upper.grad, (g.flatten() * want[:, 2]).sum().reshape(1))


def test_weights_are_dorefa_s():
    rule = Pact().role(True)
    assert isinstance(rule, PactWeights)
    w = tensor([[-1.0, -0.2, 0.1, 0.5]])
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight.data.copy_(w)
    attach(model, QuantConfig.parse("pact", "w2a2"))
    assert model[0].weight_quant(model[0].weight)[0].tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1 / 3])


# --- decay ------------------------------------------------------------------------------------------------------------


def test_decay_is_the_gradient_of_a_loss_term():
    x = torch.rand(5, 4, dtype=torch.float64) * 9
    plain, decayed = input_quantizer(), input_quantizer(decay=0.25)
    for q in (plain, decayed):
        q(x).sum().backward()
    assert decayed.upper.grad.item() == pytest.approx(plain.upper.grad.item() + 0.25 * 6)
    assert decayed.estimator.penalty(decayed, x, decayed.range.scale(decayed), -2.0).item() == pytest.approx(
        0.25 / 2 * 36
    )
    assert plain.estimator.penalty(plain, x, plain.range.scale(plain), -2.0) is None


@pytest.mark.parametrize("parts", [1, 4])
def test_decay_does_not_grow_with_micro_batches_or_loss_scaling(parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    controller = QuantController(QuantConfig.parse("pact", "w2a2", decay=0.5, calibration=0))
    controller.prepare(model)
    controller.begin(10)
    for _, q in quantizers(model):
        if not q.is_weight:
            q.set_range(tensor([0.0]), tensor([100.0]))  # nothing is clipped
    for part in torch.rand(8, 4).chunk(parts):
        controller.on_step(0, loss_scale=8.0 / parts, measure=True)
        (model(part).square().mean() * 8 / parts).backward()
    for _, q in quantizers(model):
        if not q.is_weight:
            assert q.upper.grad.item() / 8 == pytest.approx(0.5 * 100)
    assert controller.metrics()["progressive_loss"] == pytest.approx(2 * 0.5 / 2 * 100**2)


def test_decay_shrinks_the_bound():
    ends = []
    for decay in (0.0, 1.0):
        run = Run("pact", "w4a4", decay=decay, calibration=2).steps(0, 20)
        ends.append(run.model[2].input_quant.upper.item())
    assert 0 < ends[1] < ends[0]


# --- training ---------------------------------------------------------------------------------------------------------


def test_bound_follows_the_data_in_calibration_and_is_learned_after_it():
    run = Run("pact", "w4a4", calibration=2)
    q = run.model[2].input_quant
    assert not q.ready
    run.steps(0, 2)
    seen = q.upper.item()
    assert q.running[1].item() == pytest.approx(seen)
    run.steps(2, 6)
    assert q.upper.item() != seen
    assert q.running[1].item() == pytest.approx(seen)


def test_fixed_bound():
    run = Run("pact", "w4a4", calibration=1)
    assert isinstance(run.model[2].input_quant.upper, nn.Parameter)
    spec = TensorSpec(4, learn_scale=False)
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, QuantConfig("pact", TensorSpec(4), spec))
    assert not list(model[0].input_quant.parameters())


@pytest.mark.parametrize(
    ("scheme", "model", "options"),
    [("w4a4", None, {}), ("w2a2", convolutional, {"decay": 1e-3}), ("w4", None, {}), ("w1a4", None, {})],
)
def test_training(tmp_path, scheme, model, options):
    run = check_run(lambda: Run("pact", scheme, model and model(), calibration=4, **options), drop=0.95)
    if "a" not in scheme:
        check_folded(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w4a4", {"decay": -1}, "pact.decay: expected a number >= 0, got -1"),
        ("w4a4-token", {}, "0.input: method 'pact': expected granularity='tensor', got granularity='token'"),
        ("w4a4-channel", {}, "0.weight: method 'pact': expected granularity='tensor'"),
        ("w4a4", {"range": "scale"}, "method 'pact': expected range='clip', got range='scale'"),
        ("w1.58a4", {}, "method 'pact': expected bits in"),
    ],
)
def test_refusals(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), QuantConfig.parse("pact", scheme, **options))
