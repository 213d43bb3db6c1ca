"""GPTQ against the paper's equations in float64, and the second moments it works with."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.rounding import round_model
from lightning_quant.rounding.gptq import gptq_codes
from lightning_quant.rounding.held import Held
from lightning_quant.rounding.hessian import Moments, columns, is_matrix, output_error
from tests.oracle.gptq import gptq


def linear(columns=24, rows=6, scheme="w3a16-g8", dtype=torch.float64):
    layer = nn.Linear(columns, rows).to(dtype)
    model = nn.Sequential(layer)
    attach(model, QuantConfig.parse("ste", scheme))
    return layer


def second_moments(columns=24, n=200, dtype=torch.float64):
    x = torch.randn(n, columns, dtype=dtype) @ torch.randn(columns, columns, dtype=dtype)
    return (2 / n) * (x.T @ x)[None]


def test_vector_of_two_columns():
    layer = linear(2, 1, "w4a16-channel")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.6, 0.6]]))
        layer.weight_quant.scale.fill_(1.0)
    held = Held(layer, "0")
    h = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)
    assert held.nearest(held.rows).tolist() == [[1.0, 1.0]]
    codes = gptq_codes(held, h, damping=1e-12)
    assert codes.tolist() == [[1.0, 0.0]]
    assert output_error(held.real(held.nearest(held.rows)) - held.rows, h) == pytest.approx(0.96)
    assert output_error(held.real(codes) - held.rows, h) == pytest.approx(0.56)


@pytest.mark.parametrize("block", [1, 5, 8, 128])
def test_codes_are_those_of_the_paper(block):
    layer, h = linear(), second_moments()
    with torch.no_grad():
        layer.weight_quant.scale.mul_(1.01)  # as training does: ranges stay
    held = Held(layer, "0")
    scale = held.steps().expand_as(held.rows)
    got = gptq_codes(held, h, 0.01, block)
    want = gptq(held.rows.numpy(), h[0].numpy(), scale.numpy(), held.q.low, held.q.high, 0.01)
    assert (got.numpy() == want).all()
    assert (got != held.nearest(held.rows)).any()


def test_largest_inputs_first_is_the_same_on_permuted_columns():
    layer, h = linear(scheme="w3a16-channel"), second_moments()
    held = Held(layer, "0")
    order = torch.argsort(h[0].diagonal(), descending=True)
    got = gptq_codes(held, h, 0.01, 128, act_order=True)
    sorted_h = h[0][order][:, order]
    scale = held.steps().expand_as(held.rows)
    want = gptq(held.rows[:, order].numpy(), sorted_h.numpy(), scale.numpy(), held.q.low, held.q.high, 0.01)
    assert (got[:, order].numpy() == want).all()
    assert (got != gptq_codes(held, h, 0.01)).any()


def test_ranges_of_groups_are_read_off_the_updated_columns():
    layer, h = linear(), second_moments()
    fixed = Held(layer, "0").scale.clone()
    held = Held(layer, "0")
    codes = gptq_codes(held, h)
    assert torch.equal(held.scale[:, 0], fixed[:, 0])  # nothing has been updated before the first group
    assert (held.scale[:, 1:] != fixed[:, 1:]).any()
    held.write(codes)
    stored, scale, *_ = layer.weight_quant.stored(layer.weight)
    assert torch.equal(stored.double(), codes)
    assert torch.equal(scale, held.scale)
    kept = Held(layer, "0")
    gptq_codes(kept, h, act_order=True)
    assert torch.equal(kept.scale, scale)


def test_a_column_without_inputs_is_rounded_to_nearest():
    layer, h = linear(scheme="w3a16-channel"), second_moments()
    h[:, 3], h[:, :, 3] = 0.0, 0.0
    held = Held(layer, "0")
    assert torch.equal(gptq_codes(held, h)[:, 3], held.nearest(held.rows)[:, 3])


def test_damping_grows_until_there_is_a_root():
    layer = linear(dtype=torch.float32)
    x = torch.ones(1, 24)  # rank one, far beyond float32
    h = (x.T @ x)[None] * 1e12
    codes = gptq_codes(Held(layer, "0"), h, damping=1e-12)
    assert torch.isfinite(codes).all()


def test_infinite_inputs_are_refused():
    layer, h = linear(), second_moments()
    h[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"fc: expected finite inputs, got infinities or NaN\. Look for them"):
        gptq_codes(Held(layer, "fc"), h)


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "sound": lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_columns_of_a_convolution_multiply_to_its_output(name):
    conv = CONVOLUTIONS[name]()
    attach(nn.Sequential(conv), QuantConfig.parse("ste", "w4a16-channel"))
    x = torch.randn(2, 4, 9, 8) if isinstance(conv, nn.Conv2d) else torch.randn(2, 4, 9)
    assert is_matrix(conv)
    cut = columns(conv, x)
    rows = conv.weight.detach().reshape(conv.groups, -1, cut.shape[-1])
    y = (cut @ rows.mT).mT.reshape(conv.out_channels, 2, -1).movedim(0, 1)
    want = conv._conv_forward(x, conv.weight, None)
    assert torch.allclose(y, want.flatten(2), atol=1e-5)


def test_moments_are_those_of_all_inputs_and_of_each_layer():
    layers = {name: linear(8, 4, dtype=torch.float32) for name in "ab"}
    xs = [torch.randn(3, 5, 8) for _ in range(3)]
    moments = Moments()
    for x in xs:
        for name, layer in layers.items():
            moments.add(name, layer, x)
    moments.add("b", layers["b"], xs[0] + 1)
    flat = torch.cat(xs).reshape(-1, 8)
    assert torch.allclose(moments.hessian("a")[0], 2 * flat.T @ flat / len(flat), atol=1e-5)
    assert not torch.allclose(moments.hessian("b"), moments.hessian("a"))
    assert moments.hessian("c") is None


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "sound"])
def test_convolutions_are_rounded_better_than_to_nearest(name):
    model = nn.Sequential(CONVOLUTIONS[name](), nn.ReLU())
    sound = isinstance(model[0], nn.Conv1d)
    batches = [torch.randn(4, 4, 12).cumsum(-1) if sound else torch.randn(4, 4, 9, 8).cumsum(-1) for _ in range(3)]
    report = round_model(model, QuantConfig.parse("ste", "w3a16"), batches, "gptq")
    ((before, after),) = report.errors.values()
    assert after < before


def test_what_is_no_matrix_goes_to_nearest_and_is_named():
    model = nn.Sequential(nn.Conv3d(2, 3, 2), nn.ConvTranspose3d(3, 2, 2))
    report = round_model(model, QuantConfig.parse("ste", "w4a16"), [torch.randn(1, 2, 4, 4, 4)], "gptq")
    assert report.nearest == dict.fromkeys("01", "no product of a matrix that GPTQ knows")
    assert np.isfinite(model(torch.randn(1, 2, 4, 4, 4)).detach().numpy()).all()
