"""Real architectures, tiny: every matrix is accounted for, trains, saves, loads, exports and verifies."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_integration import load_training_checkpoint
from lightning_quant import LayerRule, QuantConfig, attach, detach
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.checkpoint import quantizers_aside
from lightning_quant.errors import AttachError
from lightning_quant.experts import QuantExperts
from lightning_quant.export import export, verify

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from architectures import FAMILIES, Outcome, run  # noqa: E402

NO_CONV = [LayerRule(match="*.projection", weight=None), LayerRule(match="*.conv?", weight=None)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What a family came to, once per module."""

    @cache
    def made(name: str) -> Outcome:
        return run(FAMILIES[name], tmp_path_factory.mktemp(name))

    return made


@torch.no_grad()
def logits(name: str, model: nn.Module) -> torch.Tensor:
    return model.eval()(**FAMILIES[name].inputs()).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_is_attached_or_listed_with_its_reason(name, outcome):
    """Counted: elements of parameters of two or more dimensions, each once, over those of all parameters."""
    model, report = FAMILIES[name].build(), outcome(name).report
    total = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    entries = report.attached + report.excluded + report.unsupported
    assert sum(e.share for e in entries) == pytest.approx(matrices / total, abs=1e-9)
    assert all(e.what for e in entries)
    listed = {e.path.removesuffix(".weight") for e in entries}
    assert {p for p, m in model.named_modules() if isinstance(m, nn.Linear)} <= listed
    reached = {id(layer.weight) for _, layer in quant_layers(outcome(name).model)}
    with quantizers_aside(outcome(name).model):
        held = sum(p.numel() for p in outcome(name).model.parameters() if id(p) in reached)
    assert report.coverage == pytest.approx(held / total, abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_quantizer_and_every_quantized_weight_trained(name, outcome):
    start, model = FAMILIES[name].build(), outcome(name).model
    before = dict(start.named_parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    moved = {
        path: not torch.equal(layer.weight, before[names[id(layer.weight)]]) for path, layer in quant_layers(model)
    }
    assert all(moved.values()), [p for p, ok in moved.items() if not ok]
    assert all(q.ready for _, q in quantizers(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_training_directory_loads_as_float_and_as_trained(name, outcome):
    found, family = outcome(name), FAMILIES[name]
    plain, info = family.model.from_pretrained(found.saved, output_loading_info=True)
    assert not any(info.values()), info
    with quantizers_aside(found.model):
        state = {k: v.clone() for k, v in found.model.state_dict().items()}
    read = plain.state_dict()
    assert set(read) == set(state)
    assert all(torch.equal(read[k], v) for k, v in state.items())
    again = load_training_checkpoint(found.saved)
    expected = logits(name, found.model)
    assert torch.equal(logits(name, again), expected)
    assert not torch.equal(logits(name, plain), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_export_computes_what_training_computed(name, outcome):
    found = outcome(name)
    assert found.verified.ok, str(found.verified)
    assert found.verified.max_abs_diff == 0.0
    assert len(found.verified.layers) == len(list(quant_layers(found.model)))
    assert all(check.output_diff == 0.0 for check in found.verified.layers)
    if found.refused is None:
        assert found.format == "compressed-tensors"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "c_attn (format='compressed-tensors'): expected a Linear layer, got QuantConv1D."),
        ("vit", "projection (format='compressed-tensors'): expected a Linear layer, got QuantConv2d."),
        ("whisper", "conv1 (format='compressed-tensors'): expected a Linear layer, got QuantConv1d."),
        (
            "gpt_oss",
            "expected experts that a checkpoint holds one by one, got those of GptOssForCausalLM, which are fused",
        ),
    ],
)
def test_what_the_packed_format_lacks_is_refused_with_the_way_out(name, message, outcome):
    refused = outcome(name).refused
    assert message in refused
    assert "Use format='folded'." in refused or "use format='folded'" in refused
    assert outcome(name).format == "folded"


def test_committed_table_is_what_runs_give(outcome):
    rows = json.loads((BENCHMARKS / "results" / "architectures.json").read_text(encoding="utf-8"))["families"]
    assert {name: outcome(name).row() for name in FAMILIES} == rows


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_with_convolutions_left_in_float_the_rest_is_packed(name, tmp_path):
    model = FAMILIES[name].build().eval()
    matching = NO_CONV[:1] if name == "vit" else NO_CONV[1:]
    attach(model, QuantConfig.parse("ste", "w4a16-g32", rules=matching))
    export(model, tmp_path / "out", format="compressed-tensors")
    assert verify(tmp_path / "out", model, FAMILIES[name].inputs()).ok


def test_a_group_that_does_not_fit_is_refused_with_one_that_does():
    with pytest.raises(AttachError, match=r"conv1: .*group_size=32 does not divide in_features=48. Use group_size=16"):
        attach(FAMILIES["whisper"].build(), QuantConfig.parse("ste", "w4a16-g32"))


# Experts


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-channel", "w8a16", "w3a16-g32", "w8a8", "w4a8-g32"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_packed_experts_are_read_one_by_one(name, scheme, tmp_path):
    model = FAMILIES[name].build().eval()
    attach(model, QuantConfig.parse("ste", scheme, target="transformers"))
    export(model, tmp_path / "out", format="compressed-tensors")
    report = verify(tmp_path / "out", model)
    assert report.ok, str(report)
    assert sum("experts" in check.path for check in report.layers) == 4
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert any(path.endswith(".gate") for path in config["ignore"])  # routers are float


def test_a_damaged_expert_is_found(tmp_path):
    from safetensors.torch import load_file, save_file

    model = FAMILIES["mixtral"].build().eval()
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    export(model, tmp_path / "out", format="compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight_packed"].view(-1)[:1].bitwise_xor_(1)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    report = verify(tmp_path / "out", model)
    assert not report.ok
    (bad,) = [check for check in report.layers if not check.ok]
    assert (bad.path, bad.codes_differ) == ("model.layers.1.mlp.experts.gate_up_proj", 1)


@pytest.mark.parametrize("format", ["compressed-tensors", "folded"])
def test_experts_may_have_a_grid_of_their_own_or_stay_in_float(format, tmp_path):
    config = QuantConfig.parse("ste", "w8a16")
    four = QuantConfig.parse("ste", "w4a16-g32").weight
    for i, weight in enumerate((four, None)):
        model = FAMILIES["qwen3_moe"].build().eval()
        attach(
            model,
            QuantConfig(
                method="ste",
                weight=config.weight,
                activation=None,
                rules=[LayerRule(match="*.experts.*", weight=weight)],
            ),
        )
        assert any(isinstance(m, QuantExperts) for m in model.modules()) == (weight is not None)
        export(model, tmp_path / f"out{i}", format=format)
        assert verify(tmp_path / f"out{i}", model).ok


def test_experts_on_two_grids_are_refused(tmp_path):
    rules = [LayerRule(match="*.experts.down_proj", weight=QuantConfig.parse("ste", "w4a16-g32").weight)]
    model = FAMILIES["mixtral"].build()
    attach(model, QuantConfig.parse("ste", "w8a16", rules=rules))
    with pytest.raises(ValueError, match="expected one grid for all experts"):
        export(model, tmp_path / "out", format="compressed-tensors")


# Head and embeddings


def llama(tied: bool) -> PreTrainedModel:
    family = FAMILIES["llama"]
    torch.manual_seed(0)
    return family.model(family.config(**family.sizes, tie_word_embeddings=tied)).eval()


BOTH = {"head": True, "embeddings": True}
WORKS = [
    (False, "w4a16-g32", {"head": True}, "compressed-tensors"),
    (False, "w8a8", {"head": True}, "compressed-tensors"),
    (False, "w4a16-g32", {"embeddings": True}, "folded"),
    (False, "w4a16-g32", BOTH, "folded"),
    (True, "w8a16", BOTH, "folded"),
]
REFUSED = [
    (False, {"embeddings": True}, "compressed-tensors", "expected a Linear layer, got QuantEmbedding"),
    (True, {"head": True}, "compressed-tensors", "Leave a tied head in float"),
    (
        True,
        {"head": True},
        "folded",
        r"lm_head \(format='folded'\): .* model.embed_tokens reads in float. Quantize both",
    ),
    (True, {"embeddings": True}, "folded", r"model.embed_tokens .* lm_head reads in float. Quantize both alike"),
]


@pytest.mark.parametrize(("tied", "scheme", "more", "format"), WORKS)
def test_head_and_embeddings_on_the_grid_export_exactly(tied, scheme, more, format, tmp_path):
    model = llama(tied)
    report = attach(model, QuantConfig.parse("ste", scheme, target="transformers", **more))
    asked = {"head": "lm_head", "embeddings": "model.embed_tokens"}
    assert {e.path for e in report.attached} >= {asked[name] for name in more}
    export(model, tmp_path / "out", format=format)
    assert verify(tmp_path / "out", model).ok


@pytest.mark.parametrize(("tied", "more", "format", "message"), REFUSED)
def test_head_and_embeddings_that_no_export_holds_are_refused(tied, more, format, message, tmp_path):
    model = llama(tied)
    attach(model, QuantConfig.parse("ste", "w4a16-g32", **more))
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", format=format)


def test_a_tied_weight_is_not_folded_under_its_float_reader():
    model = llama(tied=True)
    attach(model, QuantConfig.parse("ste", "w4a16-g32", head=True))
    with pytest.raises(AttachError, match=r"lm_head: .* model.embed_tokens reads in float"):
        detach(model)
    weight = model.lm_head.weight
    assert detach(model, fold=False).model.embed_tokens.weight is weight


def test_a_tied_weight_on_two_learned_grids_is_refused():
    with pytest.raises(AttachError, match=r"lm_head: .* the same parameter as model.embed_tokens.* Give both w8"):
        attach(llama(tied=True), QuantConfig.parse("ste", "w4a16-g32", **BOTH))


def test_gemma_scales_its_embedding_which_stays_in_float(tmp_path):
    """Its class is not reached, and its tied head is left out with it unless asked for."""
    model = FAMILIES["gemma2"].build()
    attach(model, QuantConfig.parse("ste", "w8a16", **BOTH))
    with pytest.raises(ValueError, match=r"lm_head .* model.embed_tokens reads in float"):
        export(model, tmp_path / "out", format="folded")
