"""DoReFa-Net: published values, the fixed grids, gradients of few bits, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.attach import attach, quant_layers, quantizers
from lightning_quant.estimators import dorefa
from lightning_quant.estimators.dorefa import Dorefa, round_gradient
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig
from tests.loop import Run, check_folded, check_run, convolutional
from tests.oracle import dorefa as paper

W = [-1.0, -0.2, 0.1, 0.5]
FACTOR = [0.55144113, 1.26188335, 1.29999197, 1.03263362]


def weight_quantizer(bits, shape=(1, 4), dtype=torch.float64, where="w", **options):
    rule = Dorefa(**options).role(True)
    spec = resolve_weight(TensorSpec(bits, True), True, rule, where)
    return FakeQuantizer(spec, Granularity(spec.granularity), rule, shape=shape, dtype=dtype)


def input_quantizer(bits, dtype=torch.float32):
    rule = Dorefa().role(False)
    spec = resolve_activation(TensorSpec(bits), False, rule)
    q = FakeQuantizer(spec, Granularity("tensor", None), rule, channels=4, dtype=dtype)
    q.fit_range(torch.empty(1, 0))
    return q


# --- published values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "y", "slope"),
    [
        (2, [-1, -1 / 3, 1 / 3, 1 / 3], FACTOR),
        (4, [-1, -0.2, 1 / 15, 0.6], FACTOR),
        (1, [-0.45, -0.45, 0.45, 0.45], [1, 1, 1, 1]),
    ],
)
def test_weights(bits, y, slope):
    w = tensor([W], dtype=torch.float64, requires_grad=True)
    out = weight_quantizer(bits)(w)
    out.sum().backward()
    assert out[0].tolist() == pytest.approx(y, abs=1e-12)
    assert w.grad[0].tolist() == pytest.approx(slope, rel=1e-7)


def test_weight_gradients_pass_at_the_largest_weight_in_float32():
    """The largest weight lies on the end of the grid, where a rounded scale could put it beyond."""
    for bits in range(2, 9):
        w = torch.randn(64, 32).requires_grad_()
        weight_quantizer(bits, (64, 32), torch.float32)(w).sum().backward()
        torch.testing.assert_close(w.grad, (1 - w.tanh().square()) / w.tanh().abs().max())
        assert (w.grad > 0).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_equal_the_paper_on_random_layers(bits):
    w = torch.randn(7, 9, dtype=torch.float64) * 2
    got = weight_quantizer(bits, (7, 9))(w)
    np.testing.assert_allclose(got.numpy(), paper.weights(w.numpy(), bits), rtol=0, atol=1e-12)


def test_a_layer_of_zeros_stays_finite():
    for bits, level in ((1, 0), (2, 1 / 3)):  # two bits have no level at 0
        w = torch.zeros(1, 4, requires_grad=True)
        y = weight_quantizer(bits, dtype=torch.float32)(w)
        y.sum().backward()
        assert w.grad.isfinite().all()
        assert y.abs()[0].tolist() == pytest.approx([level] * 4, abs=2e-7)


def test_inputs():
    """[0, 1] on 2^k - 1 steps."""
    x = tensor([-0.3, 0.2, 0.6, 1.4, 0.0, 1.0], requires_grad=True)
    y = input_quantizer(2)(x)
    y.sum().backward()
    assert torch.equal(y, tensor([0, 1 / 3, 2 / 3, 1, 0, 1]))
    assert x.grad.tolist() == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_of_inputs(bits):
    levels = input_quantizer(bits)(torch.linspace(-1, 2, 9001)).unique()
    torch.testing.assert_close(levels, torch.arange(2.0**bits) / (2**bits - 1), rtol=1e-6, atol=0)


# --- gradients of few bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 6, 8])
def test_gradient_is_the_paper_s_f(bits):
    dr = torch.randn(5, 3, 4, dtype=torch.float64) * tensor([1.0, 10, 0.1, 3, 1e-3]).double().reshape(5, 1, 1)
    got = round_gradient(dr, tensor(7), salt=11, bits=bits)
    np.testing.assert_allclose(got.numpy(), paper.gradients(dr.numpy(), bits, 7, 11), rtol=1e-6)
    for sample, source in zip(got, dr, strict=True):
        assert len(sample.unique()) <= 2**bits
        assert sample.abs().max() <= source.abs().max() * (1 + 1e-9)


def test_gradient_is_unbiased():
    dr = torch.randn(2, 6)
    mean = sum(round_gradient(dr, tensor(step), 3, 2) for step in range(4000)) / 4000
    spacing = 2 * dr.abs().amax(dim=1, keepdim=True) / 3
    assert ((mean - dr).abs() < 4 * spacing / 2 / 4000**0.5).all()


def test_gradient_edge_cases():
    step = tensor(0)
    assert round_gradient(torch.empty(0, 4), step, 0, 6).shape == (0, 4)
    assert torch.equal(round_gradient(torch.zeros(2, 3), step, 0, 6), torch.zeros(2, 3))
    assert round_gradient(tensor([1.0, -2.0, 0.1]), step, 0, 8).tolist() == pytest.approx([1, -2, 0.1], abs=0.02)
    assert round_gradient(torch.randn(3, 4).bfloat16(), step, 0, 4).dtype == torch.bfloat16


def test_gradient_never_leaves_its_levels(monkeypatch):
    """255 + 0.49999997 is 255.5 in float32, which rounds to 256."""
    monkeypatch.setattr(dorefa, "uniform", lambda shape, step, salt: torch.full(shape, 1 - 2.0**-24))
    assert round_gradient(tensor([[1.0, -1.0]]), tensor(0), 0, 8).tolist() == [[1, -1]]


def prepared(gradient_bits, step=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Hardtanh(), nn.Linear(6, 3))
    attach(model, QuantConfig.parse("dorefa", "w2a16", gradient_bits=gradient_bits))
    for _, q in quantizers(model):
        if "step" in q._buffers:
            q.step.fill_(step)
    return model


def test_layers_quantize_what_comes_back_through_their_output():
    x, g = torch.randn(8, 4), torch.randn(8, 3)
    model = prepared(3)
    model(x).backward(g)
    layer = dict(quant_layers(model))["2"]
    want = round_gradient(g, tensor(5), layer.weight_quant.salt, 3)
    torch.testing.assert_close(layer.bias.grad, want.sum(dim=0))
    plain = prepared(None)
    plain(x).backward(g)
    assert not torch.equal(plain[2].bias.grad, layer.bias.grad)
    assert torch.equal(plain(x), model(x))
    assert "step" not in plain[2].weight_quant._buffers


def test_gradients_are_float_in_evaluation_and_noise_follows_the_step():
    x = torch.randn(8, 4)
    grads = []
    for step, training in ((5, True), (5, True), (6, True), (6, False)):
        model = prepared(3, step).train(training)
        model(x).square().sum().backward()
        grads.append(model[2].bias.grad)
    assert torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[1], grads[2])
    model = prepared(None)
    model(x).square().sum().backward()
    assert torch.equal(grads[3], model[2].bias.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_whole_layers_compile():
    model, x = prepared(3), torch.randn(8, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in (1, 2):
        for _, q in quantizers(model):
            q.step.fill_(step)
        want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(got, want)


# --- refusals and training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w2a2", {"gradient_bits": 0}, "dorefa.gradient_bits: expected None or 1 to 8, got 0"),
        ("w1.58", {}, r"method 'dorefa': expected bits in \(1, 2, 3, 4, 5, 6, 7, 8\), got bits=1.58"),
        ("w2-channel", {}, "expected granularity='tensor', got granularity='channel'"),
        ("w2-asym", {}, "expected symmetric=True, got symmetric=False"),
        ("w2", {"grid": "int"}, "expected grid='midrise', got grid='int'"),
        ("w2a2-token", {}, "0.input: method 'dorefa': expected granularity='tensor', got granularity='token'"),
        ("w2", {"learn_scale": True}, "expected learn_scale=False"),
    ],
)
def test_refusals(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), QuantConfig.parse("dorefa", scheme, **options))


@pytest.mark.parametrize(
    ("scheme", "model", "drop", "options"),
    [
        ("w2", None, 0.7, {}),
        ("w1", convolutional, 0.95, {}),
        ("w4a4", None, 0.95, {}),
        ("w1a2", convolutional, 0.95, {"gradient_bits": 6}),
    ],
)
def test_training(tmp_path, scheme, model, drop, options):
    run = check_run(lambda: Run("dorefa", scheme, model and model(), **options), drop=drop)
    if "a" not in scheme:
        check_folded(run, tmp_path / "out")
