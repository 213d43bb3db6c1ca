"""SYQ: scales per pixel of the kernel, their gradient, thresholds; the granularity with other methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant.attach import attach
from lightning_quant.estimators import build_estimator
from lightning_quant.estimators.ste import Ste
from lightning_quant.estimators.syq import Syq
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import QuantConfig
from tests.loop import Run, check_folded, check_run, convolutional
from tests.oracle import syq as paper


def quantizer(bits=1.58, shape=(4, 3, 3, 2), axis=0, kind="auto", dtype=torch.float64, eta=0.05):
    rule = Syq(eta=eta).role(True)
    spec = resolve_weight(TensorSpec(bits, True, kind), True, rule)
    return FakeQuantizer(spec, Granularity(spec.granularity, axis), rule, shape=shape, dtype=dtype)


def pixels(x, axis=0):
    """(places of the kernel, weights at each), written without the code under test."""
    x = x.detach().numpy()
    x = np.moveaxis(x, axis, 0)
    return np.stack([x[:, :, i, j].ravel() for i in range(x.shape[2]) for j in range(x.shape[3])])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 1.58])
def test_alphas_start_at_the_mean_magnitude_of_their_pixel(bits, axis):
    w = torch.randn(4, 3, 3, 2, dtype=torch.float64)
    q = quantizer(bits, axis=axis)
    q.fit_range(w)
    alpha = q.scale.detach() / (2 if bits == 1 else 1)
    assert alpha.shape == (6, 1)
    np.testing.assert_allclose(alpha[:, 0].numpy(), np.abs(pixels(w, axis)).mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 1.58])
def test_output_and_gradients(bits, axis):
    w = torch.randn(4, 3, 3, 2, dtype=torch.float64).requires_grad_()
    g = torch.randn(4, 3, 3, 2, dtype=torch.float64)
    q = quantizer(bits, axis=axis, eta=0.2)
    q.fit_range(w)
    alpha = (q.scale.detach() / (2 if bits == 1 else 1)).numpy()
    y = q(w)
    y.backward(g)
    code = paper.codes(pixels(w, axis), bits, 0.2, w.abs().max().item())
    assert (code == 0).any() == (bits == 1.58)
    np.testing.assert_allclose(pixels(y, axis), alpha * code, rtol=1e-12)
    assert torch.equal(w.grad, g)
    terms = (pixels(g, axis) * code).sum(axis=1)  # dL/dalpha; the one-bit scale is 2 alpha
    np.testing.assert_allclose(q.scale.grad[:, 0].numpy(), terms / (2 if bits == 1 else 1), rtol=1e-12)


def test_gradient_of_the_scale_is_not_lsq_s():
    """LSQ would subtract w/s inside the range, and multiply by 1/sqrt(N)."""
    w = tensor([[[[0.5]], [[-0.6]], [[0.55]]]], dtype=torch.float64)
    q = quantizer(shape=(1, 3, 1, 1))
    q.fit_range(w)
    q(w).sum().backward()
    assert q.scale.grad.item() == 1  # 1 - 1 + 1


def test_threshold_is_a_share_of_the_layer_s_largest_weight():
    w = tensor([[[[1.0, 0.1]], [[0.04, -0.06]]]], dtype=torch.float64)
    q = quantizer(shape=(1, 2, 1, 2))
    q.fit_range(w)
    codes, scale, _, _ = q.stored(w)
    assert codes.tolist() == [[[[1, 1]], [[0, -1]]]]
    assert scale[:, 0].tolist() == pytest.approx([0.52, 0.08])
    q = quantizer(shape=(1, 2, 1, 2), eta=0.0)
    q.fit_range(w)
    assert (q.stored(w)[0] != 0).all()


def test_linear_layers_have_one_scale_per_channel():
    q = quantizer(shape=(5, 7))
    w = torch.randn(5, 7, dtype=torch.float64)
    q.fit_range(w)
    assert q.scale_shape == (5, 1)
    torch.testing.assert_close(q.scale.detach(), w.abs().mean(dim=1, keepdim=True))


def test_inputs_are_those_of_ste():
    assert Syq().role(False) == Ste()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_compile(dtype):
    q, w = quantizer(dtype=dtype), torch.randn(4, 3, 3, 2, dtype=dtype).requires_grad_()
    q.fit_range(w)
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    want, got = q(w), compiled(w)
    assert torch.equal(got, want)
    g = torch.randn_like(w)
    torch.testing.assert_close(
        torch.autograd.grad(got, (w, q.scale), g), torch.autograd.grad(want, (w, q.scale), g), rtol=1e-2, atol=1e-2
    )


# --- the granularity with other methods -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ste", "lsq"])
def test_other_methods_may_have_scales_per_pixel(method):
    w = torch.randn(4, 3, 3, 3)
    spec = resolve_weight(TensorSpec(4, granularity="pixel"), True, build_estimator(method))
    q = FakeQuantizer(spec, Granularity("pixel"), build_estimator(method), shape=w.shape)
    q.fit_range(w)
    y = q(w)
    assert torch.equal(y, q.on_grid(w))
    assert (y - w).abs().max() < 0.5 * w.abs().max()


def test_methods_with_state_per_channel_refuse_pixels():
    spec = TensorSpec(4, granularity="pixel")
    with pytest.raises(ValueError, match=r"fc: method pege: expected scales that divide channels.*Use 'channel'"):
        resolve_weight(spec, True, build_estimator("pege"), "fc")
    with pytest.raises(ValueError, match="got 'pixel' with dynamic=False"):
        resolve_activation(spec, True, Ste())


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("w1.58", {"eta": 1.0}, r"syq.eta: expected a number in \[0, 1\), got 1.0"),
        ("w2", {}, r"0.weight: method 'syq': expected bits in \(1, 1.58\), got bits=2"),
        ("w1.58-asym", {}, "expected symmetric=True"),
        ("w1.58", {"range": "bounds"}, r"expected range in \('plain', 'scale'\), got range='bounds'"),
    ],
)
def test_refusals(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(4, 4)), QuantConfig.parse("syq", scheme, **options))


@pytest.mark.parametrize(
    ("scheme", "model"),
    [("w1.58", convolutional), ("w1", convolutional), ("w1.58", None), ("w1.58-tensor", None), ("w1a8", convolutional)],
)
def test_training(tmp_path, scheme, model):
    run = check_run(lambda: Run("syq", scheme, model and model()), drop=0.95)
    assert all(layer.weight_quant.scale.requires_grad for layer in run.model if hasattr(layer, "weight_quant"))
    if "a" not in scheme:
        check_folded(run, tmp_path / "out")
