"""Words of packed integers are those of compressed-tensors; encoding in parts changes nothing."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from torch import nn

from lightning_quant import AttachError, QuantConfig, attach, encoding
from lightning_quant.attach import quant_layers
from lightning_quant.export import words


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(5, 64), (3, 40), (1, 7), (0, 32)])
@pytest.mark.parametrize("at_once", [1, 2**21])
def test_words_are_those_of_the_reader(monkeypatch, bits, shape, at_once):
    monkeypatch.setattr(words, "ROWS", at_once)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(words.pack_words(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(128, 1), (128, 4), (33, 2), (1, 5)])
def test_zero_points_are_packed_along_rows(bits, shape):
    half = 1 << (bits - 1)
    zeros = torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    packed = words.pack_words(zeros.t(), bits).t()
    assert torch.equal(packed, pack_to_int32(zeros, bits, packed_dim=0))
    without_values = words.pack_words(zeros.t().to("meta"), bits).t()
    assert without_values.is_meta
    assert without_values.shape == packed.shape


SCHEMES = ["w4a16-g32", "w4a16-g32-asym", "w8a16", "w8a16-tensor", "nf4-g32", "w1.58a16-channel", "w1a16-g32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["ste", "lsq", "lsq_plus", "pege", "dorefa", "twn", "tsq"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_encoded_alike_however_many_at_a_time(monkeypatch, scheme, method, dtype):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 24), nn.Conv2d(32, 8, 1), nn.ConvTranspose2d(32, 8, 2)).to(dtype)
    try:
        attach(layers, QuantConfig.parse(method, scheme))
    except ValueError:
        pytest.skip("the method does not take the scheme")
    found = {}
    for at_once in (2**21, 100):
        monkeypatch.setattr(encoding, "ELEMENTS", at_once)
        for path, layer in quant_layers(layers):
            q, weight = layer.weight_quant, layer.folded()[0]
            parts = [t for t in (q.on_grid(weight), *q.stored(weight)) if isinstance(t, torch.Tensor)]
            assert parts[0].shape == parts[1].shape == weight.shape
            for a, b in zip(parts, found.setdefault(path, parts), strict=True):
                assert torch.equal(a, b), path
            assert torch.equal(parts[0], q.eval()(weight).detach()), path


def test_attach_without_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(AttachError, match="a weight with values, got a meta tensor"):
        attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    attach(model, QuantConfig.parse("ste", "w4a16-g32"), fit=False)
    assert model[0].weight.is_meta
    assert model[0].weight_quant.scale.device.type == "cpu"
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 8))
    attach(model, QuantConfig.parse("pege", "w4a16-g32", theta="element", theta_dtype="uint8"), fit=False)
    assert model[0].weight_quant.theta.is_meta  # as large as the weight
