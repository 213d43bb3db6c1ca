"""Fused experts: every row of every expert on its own grid, in whatever implementation the model computes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from lightning_quant import ESTIMATORS, CoverageError, LayerRule, QuantConfig, attach, detach
from lightning_quant.attach import check_coverage, quant_layers
from lightning_quant.errors import AttachError
from lightning_quant.experts import ExpertWeight, QuantExperts
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_weight
from lightning_quant.scheme import TensorSpec, parse_scheme

LSQ = QuantConfig.parse("lsq", "w4a16-g16")
SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 3}
SIZES |= {"num_experts_per_tok": 2, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {
    "mixtral": lambda **more: MixtralForCausalLM(MixtralConfig(**SIZES, **more)),
    "gpt_oss": lambda **more: GptOssForCausalLM(
        GptOssConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **more)
    ),
}
IDS = torch.arange(2 * 8).reshape(2, 8) % 29 + 3


def build(kind: str = "mixtral", **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return KINDS[kind](**more).eval()


def experts(model: PreTrainedModel) -> torch.nn.Module:
    return model.model.layers[0].mlp.experts


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


# Rows


@pytest.mark.parametrize("axis", [1, 2])
def test_a_stack_has_the_rows_of_its_matrices_one_below_the_other(axis):
    x = torch.randn(3, 4, 6)
    rows = x.movedim(axis, 1).reshape(-1, x.shape[3 - axis])
    for kind, size in (("channel", 0), ("group", 2), ("pixel", 0)):
        mine, plain = Granularity(kind, axis, size, stacked=True), Granularity(kind, 0, size)
        assert mine.rows(x.shape) == plain.rows(rows.shape)
        assert mine.scale_shape(x.shape) == plain.scale_shape(rows.shape)
        assert torch.equal(mine.view(x), plain.view(rows))
        assert torch.equal(mine.unview(mine.view(x), x.shape), x)


def as_rows(x: torch.Tensor, axis: int) -> torch.Tensor:
    return x.movedim(axis, 1).flatten(0, 1) if x.ndim == 3 else x


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("method", ESTIMATORS)
def test_every_method_sees_a_stack_as_the_matrix_of_its_rows(method, axis):
    torch.manual_seed(0)
    stack = torch.randn((3, 4, 128) if axis == 1 else (3, 128, 4)) * 0.3
    found = []
    for x, place in ((stack, (axis, True)), (as_rows(stack, axis), (0, False))):
        rule = ESTIMATORS[method]().role(True)
        spec = resolve_weight(parse_scheme(ESTIMATORS[method].about.scheme)[0], False, rule)
        granularity = Granularity(spec.granularity, place[0], spec.group_size or 0, place[1])
        q = FakeQuantizer(spec, granularity, rule, shape=tuple(x.shape))
        q.fit_range(x)
        x = x.clone().requires_grad_()
        y = q(x)
        wave = torch.sin(torch.arange(x.numel())).reshape(12, 128)
        (as_rows(y, axis) * wave).sum().backward()
        found.append((as_rows(y.detach(), axis), as_rows(x.grad, axis), as_rows(q.on_grid(x), axis)))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


# The module


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_quantized_in_place_and_come_back(kind):
    model = build(kind)
    born, parameters = copy.deepcopy(model), dict(model.named_parameters())
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    report = attach(model, LSQ)
    entries = {e.path.rpartition(".")[2]: e for e in report.attached if "experts" in e.path}
    assert set(entries) == {"gate_up_proj", "down_proj"}
    assert entries["gate_up_proj"].what == "w4 group16 learned"
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in parameters.items())
    held = experts(model)
    assert isinstance(held, QuantExperts)
    assert isinstance(held, type(experts(born)))
    assert held.gate_up_proj_quant.weight_quant.scale.shape == (3 * 96, 2)
    assert held.down_proj_quant.weight_quant.scale.shape == (3 * 32, 3)
    quantized = logits(model)
    assert not torch.equal(quantized, logits(born))
    detach(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), quantized)
    levels = experts(model).gate_up_proj if kind == "mixtral" else experts(model).gate_up_proj.mT
    assert all(len(block.unique()) <= 16 for block in levels.reshape(-1, 16))
    assert torch.equal(logits(detach(_attached(kind), fold=False)), logits(born))


def _attached(kind: str = "mixtral", config: QuantConfig = LSQ) -> PreTrainedModel:
    model = build(kind)
    attach(model, config)
    return model


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_computes_with_the_rounded_weights(kind, way):
    model = _attached(kind)
    folded = detach(copy.deepcopy(model))
    for m in (model, folded):
        m.set_experts_implementation(way)
    assert torch.equal(logits(model), logits(folded))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name in ("gate_up_proj", "down_proj"):
        assert getattr(experts(model), name).grad.abs().sum() > 0
        assert getattr(experts(model), f"{name}_quant").weight_quant.scale.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_the_rounded_weights(kind):
    """Straight through and no scale to learn: what plain experts with those weights get, inside of the range."""
    config = QuantConfig.parse("ste", "w8a16")
    model = _attached(kind, config)
    folded = detach(copy.deepcopy(model))
    for m in (model, folded):
        m(input_ids=IDS, labels=IDS).loss.backward()
    for name in ("gate_up_proj", "down_proj"):
        mine, expected = getattr(experts(model), name).grad, getattr(experts(folded), name).grad
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-8)


def test_copies_and_pickles():
    model = _attached()
    twin = copy.deepcopy(model)
    held = experts(twin)
    assert held.gate_up_proj_quant.weight is held.gate_up_proj
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    expected = logits(model)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(read), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
def test_compiled_as_eager():
    model = _attached()
    model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(experts(model), backend="eager", fullgraph=True)
    x = torch.randn(6, 32)
    chosen, shares = torch.tensor([[0, 2]] * 6), torch.full((6, 2), 0.5)
    assert torch.equal(compiled(x, chosen, shares), experts(model)(x, chosen, shares))


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        model = _attached().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        held = experts(model)
        found.append((held.down_proj.grad, held.down_proj_quant.weight_quant.scale.grad))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_an_expert_without_tokens_is_covered():
    model = _attached()
    held = experts(model)
    held(torch.randn(4, 32), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5))
    assert held.gate_up_proj_quant.weight_quant.called
    with pytest.raises(CoverageError, match="q_proj"):
        check_coverage(model, "error", "training")


# Settings


def test_rules_reach_single_weights():
    rules = [LayerRule(match="*.down_proj", weight=None), LayerRule(match="*.gate_up_proj", weight=TensorSpec(bits=8))]
    model = build()
    report = attach(model, QuantConfig.parse("ste", "w4a16-g16", rules=rules))
    assert {e.what for e in report.attached if "gate_up" in e.path} == {"w8 channel dynamic"}
    assert {e.what for e in report.excluded if "down_proj" in e.path} == {"by a rule"}
    held = [p for p, layer in quant_layers(model) if isinstance(layer, ExpertWeight)]
    assert held == ["model.layers.0.mlp.experts.gate_up_proj_quant"]
    folded = detach(copy.deepcopy(model))
    assert torch.equal(logits(model), logits(folded))
    assert torch.equal(experts(folded).down_proj, experts(build()).down_proj)


def test_inputs_of_experts_stay_in_float_and_the_report_says_so():
    model = build()
    report = attach(model, QuantConfig.parse("ste", "w8a8"))
    assert {e.what for e in report.attached if "experts" in e.path} == {"w8 channel dynamic, inputs in float"}
    assert all(layer.input_quant is None for _, layer in quant_layers(model) if isinstance(layer, ExpertWeight))


def test_a_group_that_does_not_divide_is_refused_with_the_weight_named():
    with pytest.raises(AttachError, match=r"experts\.down_proj.*group_size=32 does not divide in_features=48"):
        attach(build(), QuantConfig.parse("ste", "w4a16-g32", rules=[]))


def test_experts_of_another_making_are_reported_not_guessed():
    model = build()
    torch.nn.utils.parametrize.register_parametrization(experts(model), "down_proj", torch.nn.Identity())
    report = attach(model, LSQ)
    assert any("experts" in e.path for e in report.unsupported)
    assert not any("experts" in e.path for e in report.attached)
