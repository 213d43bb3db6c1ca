"""A runtime's constraints are met while training, so that an export rounds nothing once more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.export import FORMATS
from lightning_quant.resolve import for_target, resolve_weight
from lightning_quant.scales import SCALE_FORMATS
from lightning_quant.scheme import TensorSpec
from lightning_quant.targets import TARGETS, Target


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def test_targets_name_formats_and_scale_formats_that_exist():
    for target in TARGETS.values():
        assert target.format in FORMATS
        assert target.scale_format in SCALE_FORMATS


@pytest.mark.parametrize("method", ["ste", "lsq", "pege"])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w4a16-asym", "w5a16-g64", "w2a16"])
def test_llama_cpp_trains_with_half_precision_scales_of_its_blocks(scheme, method):
    model = mlp()
    attach(model, QuantConfig.parse(method, scheme, target="llama.cpp"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().sum().backward()
        optimizer.step()
    for _, layer in quant_layers(model):
        q = layer.weight_quant
        assert q.spec.group_size == (64 if "g64" in scheme else 32)
        code, scale, _, offset = q.stored(layer.weight)
        assert torch.equal(scale, scale.half().float())
        assert (offset is None) == ("asym" not in scheme)
        if offset is not None:
            assert torch.equal(offset, offset.half().float())
        u = code.float() - q.low if offset is not None else code.float()
        real = u.unflatten(1, (-1, q.spec.group_size)) * scale.unsqueeze(-1)
        real = real if offset is None else real + offset.unsqueeze(-1)
        assert torch.equal(real.flatten(1), layer.on_grid())


def test_a_learned_scale_moves_though_its_format_is_coarse():
    model = mlp()
    attach(model, QuantConfig.parse("lsq", "w4a16", target="llama.cpp"))
    scale = model[0].weight_quant.scale
    model(torch.randn(16, 64)).square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0
    scale.data += 1e-7
    assert not torch.equal(scale.data, scale.data.half().float())
    own = model[0].weight_quant.range.scale(model[0].weight_quant)
    assert torch.equal(own, scale.data.half().float())


def test_static_inputs_for_runtimes_with_constant_ranges():
    model = mlp()
    attach(model, QuantConfig.parse("ste", "w8a8", target="onnxruntime"))
    assert not any(q.spec.dynamic for _, q in quantizers(model) if not q.is_weight)
    with pytest.raises(ValueError, match=r"input \(target's format: onnx\): expected activations on a constant range"):
        attach(mlp(), QuantConfig.parse("ste", "w8a8-dynamic", target="openvino"))


def test_what_the_file_cannot_hold_is_refused_before_training():
    with pytest.raises(ValueError, match=r"0\.weight .*expected groups of 32 or a multiple, got 16"):
        attach(mlp(), QuantConfig.parse("ste", "w4a16-g16", target="llama.cpp"))
    with pytest.raises(ValueError, match="expected float16 scales, got 'pow2'"):
        attach(mlp(), QuantConfig.parse("ste", "w4a16", target="llama.cpp", scale_format="pow2"))
    with pytest.raises(
        ValueError,
        match=r"expected one of gptq, llama\.cpp, onnxruntime, openvino, torchao, transformers, vllm, got 'tensorrt'",
    ):
        QuantConfig(target="tensorrt")
    with pytest.raises(ValueError, match="or range='offset'"):
        attach(mlp(), QuantConfig.parse("ste", "w4a16-asym", scale_format="float16"))


def test_other_specs_are_left_alone():
    spec = TensorSpec(4, granularity="channel")
    assert for_target(spec, TARGETS["vllm"], True, "w") is spec
    assert for_target(spec, Target("gguf", group_size=32), True, "w") is spec
    open_ = for_target(TensorSpec(4), TARGETS["llama.cpp"], True, "w")
    assert resolve_weight(open_, False, Lsq()).scale_format == "float16"
