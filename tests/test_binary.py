"""BinaryNet and XNOR-Net: published values, masks, clipped latent weights, inputs of one bit, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.attach import attach
from lightning_quant.estimators.binary import Binary
from lightning_quant.estimators.ste import Ste
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig
from tests.loop import Run, check_folded, check_run, convolutional
from tests.oracle import binary as paper


def weight_quantizer(alpha="filter", shape=(1, 6), dtype=torch.float64, axis=0):
    rule = Binary(alpha).role(True)
    spec = resolve_weight(TensorSpec(1, True), False, rule)
    return FakeQuantizer(spec, Granularity(spec.granularity, axis), rule, shape=shape, dtype=dtype)


def input_quantizer(alpha="filter", bits=1, convolutional=False, dtype=torch.float64, **more):
    rule = Binary(alpha).role(False)
    spec = resolve_activation(TensorSpec(bits, **more), convolutional, rule)
    q = FakeQuantizer(spec, Granularity(spec.granularity, None), rule, channels=4, dtype=dtype)
    if q.observer.data_free:
        q.fit_range(torch.empty(1, 0))
    return q


# --- published values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [weight_quantizer("none", (1, 4)), input_quantizer("none")], ids=["weights", "inputs"])
def test_binarynet(q):
    x = tensor([[-1.5, -0.3, 0.0, 0.8]], dtype=torch.float64, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y[0].tolist() == [-1, -1, 1, 1]
    assert x.grad[0].tolist() == [0, 1, 1, 1]


def test_ends_of_the_mask_are_inside():
    """Latent weights are clipped to the ends; were these outside, such a weight could never move again."""
    for q in (weight_quantizer("none", (1, 4)), input_quantizer("none")):
        x = tensor([[-1.0, 1.0, -1.0 - 1e-9, 1.0 + 1e-9]], dtype=torch.float64, requires_grad=True)
        q(x).sum().backward()
        assert x.grad[0].tolist() == [1, 1, 0, 0]


def test_xnor_alpha():
    w = tensor([[0.5, -0.1, 0.3, -0.8, 0.05, 0.02]], dtype=torch.float64)
    assert weight_quantizer()(w)[0].tolist() == pytest.approx([0.295, -0.295, 0.295, -0.295, 0.295, 0.295])


def test_xnor_gradient_has_both_terms():
    """alpha = 1: g (1/n + alpha 1[|w| <= 1])."""
    w = tensor([[0.5, -1.5, 0.9, -1.1]], dtype=torch.float64, requires_grad=True)
    q = weight_quantizer(shape=(1, 4))
    q(w).backward(tensor([[1.0, 2, -1, 4]], dtype=torch.float64))
    assert w.grad[0].tolist() == pytest.approx([1.25, 0.5, -1.25, 1.0])


@pytest.mark.parametrize("axis", [0, 1])
def test_filters_are_output_channels(axis):
    shape = (4, 3, 3, 3)
    w = torch.randn(shape, dtype=torch.float64)
    y = weight_quantizer(shape=shape, axis=axis)(w)
    rows = w.movedim(axis, 0).flatten(1)
    want, _ = paper.filters(rows.numpy())
    np.testing.assert_allclose(y.movedim(axis, 0).flatten(1).numpy(), want, rtol=1e-12)


def test_one_alpha_per_layer():
    w = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    y = weight_quantizer("layer", (4, 6))(w)
    y.sum().backward()
    want, slope = paper.filters(w.detach().numpy().reshape(1, -1))
    np.testing.assert_allclose(y.detach().numpy().reshape(1, -1), want, rtol=1e-12)
    np.testing.assert_allclose(w.grad.numpy().reshape(1, -1), slope, rtol=1e-12)


def test_alpha_follows_the_weight():
    q = weight_quantizer(shape=(2, 6))
    for factor in (1.0, 7.0):
        w = torch.randn(2, 6, dtype=torch.float64) * factor
        torch.testing.assert_close(q(w).abs(), w.abs().mean(dim=1, keepdim=True).expand(2, 6))
    assert not q.state_dict()


def test_a_filter_of_zeros_stays_near_zero():
    assert weight_quantizer(dtype=torch.float32)(torch.zeros(1, 6)).abs().max() <= 2e-7


# --- latent weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "clipped"), [("none", True), ("filter", False), ("layer", False)])
def test_latent_weights_of_binarynet_are_clipped(alpha, clipped):
    run = Run("binary", "w1", alpha=alpha, lr=0.6)
    run.steps(0, 3)
    largest = max(layer.weight.abs().max().item() for layer in run.model if isinstance(layer, nn.Linear))
    assert (largest <= 1) == clipped


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_of_linear_layers_have_one_k_per_token():
    x = torch.randn(3, 5, 8, dtype=torch.float64).requires_grad_()
    q = input_quantizer()
    assert (q.spec.dynamic, q.spec.granularity) == (True, "token")
    y = q(x)
    g = torch.randn_like(x)
    y.backward(g)
    k = x.detach().abs().mean(dim=-1, keepdim=True)
    torch.testing.assert_close(y.detach(), k * torch.where(x >= 0, 1.0, -1.0))
    torch.testing.assert_close(x.grad, g * k * (x.abs() <= 1))


def test_inputs_of_convolutions_have_one_measured_k():
    q = input_quantizer(convolutional=True)
    assert (q.spec.dynamic, q.spec.granularity, q.spec.symmetric) == (False, "tensor", True)
    for x in (torch.full((2, 4), 1.0), torch.full((2, 4), -3.0)):
        q.observe(x.double())
        q.commit()
    assert q(tensor([[0.2, -0.2]], dtype=torch.float64))[0].tolist() == pytest.approx([1.2, -1.2])


def test_zero_tokens_stay_near_zero():
    y = input_quantizer(dtype=torch.float32)(torch.zeros(2, 4))
    assert y.abs().max() <= 2e-7


@pytest.mark.parametrize("alpha", ["filter", "none"])
def test_wider_inputs_are_those_of_ste(alpha):
    x = torch.randn(3, 8, dtype=torch.float64)
    results = []
    for rule in (Binary(alpha).role(False), Ste()):
        spec = resolve_activation(TensorSpec(4, granularity="tensor", dynamic=False), False, rule)
        q = FakeQuantizer(spec, Granularity(spec.granularity, None), rule, channels=8, dtype=x.dtype)
        q.set_range(tensor([-1.0]), tensor([1.0]))
        at = x.clone().requires_grad_()
        y = q(at)
        y.sum().backward()
        results.append((spec, y.detach(), at.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_inputs_of_a_first_layer_compile():
    """Nothing there needs a gradient, which torch.compile treats on a path of its own."""
    q, x = input_quantizer(dtype=torch.float32), torch.randn(3, 4)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(q, fullgraph=True, backend="aot_eager")(x), q(x))


# --- refusals and training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w1", {"alpha": "filer"}, "binary.alpha: .*Did you mean alpha 'filter'"),
        ("w2", {}, "0.weight: method 'binary': expected bits=1, got bits=2"),
        ("w1-tensor", {}, "expected granularity='channel', got granularity='tensor'"),
        ("w1-channel", {"alpha": "none"}, "expected granularity='tensor', got granularity='channel'"),
        ("w1-asym", {}, "expected symmetric=True"),
        ("w1a1-token", {"alpha": "none"}, "0.input: method 'binary': expected granularity='tensor', got"),
    ],
)
def test_refusals(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), QuantConfig.parse("binary", scheme, **options))


@pytest.mark.parametrize(
    ("scheme", "model", "options"),
    [
        ("w1", None, {}),
        ("w1", convolutional, {"alpha": "layer"}),
        ("w1", None, {"alpha": "none"}),
        ("w1a8", None, {}),
        ("w1a1", None, {}),
        ("w1a1", convolutional, {}),
        ("w1a1", None, {"alpha": "none"}),
    ],
)
def test_training(tmp_path, scheme, model, options):
    run = check_run(lambda: Run("binary", scheme, model and model(), **options), drop=0.95)
    if "a" not in scheme:
        check_folded(run, tmp_path / "out")
