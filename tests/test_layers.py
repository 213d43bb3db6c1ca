"""Every quantized layer computes its float layer on quantized weight and input; modules keep who they are."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lightning_quant.attach import attach, detach
from lightning_quant.layers import LAYERS, QuantLayer, float_class, is_convolution, layer_class
from lightning_quant.packed import PackedLinear
from lightning_quant.spec import QuantConfig
from lightning_quant.transformers_layers import TRANSFORMERS_LAYERS

CASES = {
    "linear": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), (2, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 9, 9)),
    "conv2d reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(10, 8, padding_idx=0), None),
    "gpt2 conv1d": (lambda: Conv1D(6, 8), (2, 3, 8)),
    "falcon linear": (lambda: FalconLinear(8, 6), (2, 3, 8)),
}
SCHEMES = ("w8a16", "w4a16-channel", "w4a8-channel-static", "w2a4-tensor-static")


def example(shape):
    return torch.tensor([[1, 0, 9], [2, 2, 3]]) if shape is None else torch.randn(shape)


def attached(layer, scheme, method="ste"):
    model = nn.Sequential(layer)
    attach(model, QuantConfig.parse(method, scheme, embeddings=True))
    return model


def test_every_layer_class_has_a_case():
    made = {type(build()) for build, _ in CASES.values()}  # a packed layer has no weight to set: it has its own test
    assert made | {PackedLinear} == {
        *LAYERS,
        *TRANSFORMERS_LAYERS,
    }


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_float_layer_on_quantized_tensors(name, scheme):
    build, shape = CASES[name]
    layer, x = build(), example(shape)
    reference = copy.deepcopy(layer)
    unquantized = layer(x)
    y = attached(layer, scheme)(x)
    assert not torch.equal(y, unquantized)
    with torch.no_grad():
        reference.weight.copy_(layer.weight_quant.on_grid(layer.weight))
        quant_x = x if layer.input_quant is None else layer.input_quant(x)
        assert torch.equal(y, reference(quant_x))
    assert (layer.input_quant is None) == (shape is None or "a16" in scheme)


@pytest.mark.parametrize("method", ["ste", "pege"])
@pytest.mark.parametrize("name", CASES)
def test_straight_through_gradients_are_those_of_the_float_layer(name, method):
    """With the outputs of both quantizers fixed, weight, bias and input see the float layer's gradients."""
    build, shape = CASES[name]
    layer, x = build(), example(shape)
    reference = copy.deepcopy(layer)
    model = attached(layer, "w8a16", method)  # dynamic absmax ranges: nothing is clipped
    with torch.no_grad():
        reference.weight.copy_(layer.weight_quant.on_grid(layer.weight))
    if shape is not None:
        x.requires_grad_()
    for module in (model, reference):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)
    if getattr(layer, "bias", None) is not None:
        torch.testing.assert_close(layer.bias.grad, reference.bias.grad)


@pytest.mark.parametrize("name", [n for n in CASES if n != "embedding"])
def test_pege_learns_one_b_per_input_channel(name):
    build, shape = CASES[name]
    layer, x = build(), example(shape)
    model = attached(layer, "w4a4-channel-static", "pege")
    layer.input_quant.theta.data.uniform_(0.1, 0.9)
    model(x).square().sum().backward()
    channels = {"linear": 8, "gpt2": 8, "falcon": 8}.get(name.split()[0], 2 if "3d" in name else 4)
    assert layer.input_quant.theta.grad.shape == (channels,)
    assert layer.input_quant.theta.grad.ne(0).all()


@pytest.mark.parametrize("name", CASES)
def test_class_in_place_keeps_identity_names_and_hooks(name):
    build, shape = CASES[name]
    layer, x = build(), example(shape)
    kind, keys = type(layer), list(layer.state_dict())
    parameters = dict(layer.named_parameters())
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    model = attached(layer, "w4a16-channel")
    assert model[0] is layer
    assert isinstance(layer, kind)
    assert isinstance(layer, QuantLayer)
    assert all(layer.get_parameter(n) is p for n, p in parameters.items())
    assert [k for k in layer.state_dict() if "_quant." not in k] == keys
    layer.load_state_dict({k: torch.zeros_like(v) for k, v in build().state_dict().items()}, strict=False)
    model(x)
    assert calls == [1]
    assert float_class(layer) is kind
    detach(model)
    assert type(layer) is kind
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("method", ["ste", "pege", "dsq", "pege_replace"])
@pytest.mark.parametrize("name", CASES)
def test_deepcopy_and_torch_save_compute_the_same(name, method):
    build, shape = CASES[name]
    x = example(shape)
    model = attached(build(), "w4a8-channel-static", method).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(twin[0], QuantLayer)
        assert torch.equal(twin(x), model(x))
        assert twin[0].weight is not model[0].weight


def test_gpt2_scales_belong_to_output_columns():
    layer = Conv1D(6, 8)
    attached(layer, "w8a16")
    weight = layer.quant_terms()[0]
    scale = layer.weight.abs().amax(dim=0) / 127
    torch.testing.assert_close(weight, (layer.weight / scale).round() * scale)


def test_transposed_convolution_scales_belong_to_output_channels():
    layer = nn.ConvTranspose2d(4, 6, 3)
    attached(layer, "w8a16")
    scale = layer.weight.abs().amax(dim=(0, 2, 3), keepdim=True) / 127
    torch.testing.assert_close(layer.quant_terms()[0], (layer.weight / scale).round() * scale)


def test_transposed_convolution_takes_an_output_size():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    reference = copy.deepcopy(layer)
    model = attached(layer, "w8a16")
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        reference.weight.copy_(layer.weight_quant.on_grid(layer.weight))
        assert torch.equal(model[0](x, [12, 12]), reference(x, [12, 12]))


def test_padding_row_of_an_embedding_gets_no_gradient():
    layer = nn.Embedding(10, 8, padding_idx=2)
    attached(layer, "w4a16-channel")(torch.tensor([1, 2, 2])).sum().backward()
    assert not layer.weight.grad[2].any()
    assert layer.weight.grad[1].any()


def test_subclasses_are_not_guessed_at():
    class Mine(nn.Linear):
        pass

    assert layer_class(Mine) is None
    assert layer_class(nn.modules.linear.NonDynamicallyQuantizableLinear) is None
    assert is_convolution(nn.Conv2d)
    assert not is_convolution(nn.Linear)
