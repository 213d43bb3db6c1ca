"""Counting from shapes, hardware's data, and costs, on figures a reader can check."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_quant import QuantConfig
from lightning_quant.roofline import HARDWARE, Hardware, Load, count, count_phases, load_hardware, measure, roofline
from lightning_quant.roofline.counting import pairs

COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
LLAMA = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 128}
TOY = Hardware("toy", {"bfloat16": 1e12, "int8": 2e12}, 1e10, 1e6)


def on_meta(kind: type[PreTrainedModel], config: object) -> PreTrainedModel:
    with torch.device("meta"):
        return kind._from_config(config, dtype=torch.bfloat16).eval()


def llama(**more: object) -> PreTrainedModel:
    return on_meta(LlamaForCausalLM, LlamaConfig(**{**LLAMA, **more}))


class Odd(nn.Module):
    """The same weight read in several ways, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 8))
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x, image):
        y = F.linear(x, self.weight) + x @ self.weight.T + torch.einsum("bsi,oi->bso", x, self.weight)
        return y, self.conv(image)


def test_every_way_of_multiplying_is_seen():
    with torch.device("meta"):
        model, x, image = Odd(), torch.empty(2, 3, 8), torch.empty(1, 3, 6, 6)
    found = count(model, {"x": x, "image": image})
    *products, conv = found.uses
    assert [(u.path, u.kind, u.weights, u.macs) for u in products] == [("", "product", ("weight",), 2 * 3 * 8 * 4)] * 3
    assert all((u.inputs, u.outputs) == (48, 24) for u in products)
    assert (conv.path, conv.weights) == ("conv", ("conv.weight", "conv.bias"))
    assert conv.macs == 5 * 16 * 3 * 9
    assert (conv.inputs, conv.outputs) == (3 * 36, 5 * 16)
    assert found.macs == 3 * 192 + 2160
    assert found.called == {"", "conv"}


def test_causal_attention_counts_the_pairs_that_its_mask_leaves():
    found = count_phases(llama(), Load(batch=3, prompt=16, context=10))
    attention = [u for u in found["prefill"].uses if u.kind == "attention"]
    assert [u.path for u in attention] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    first = attention[0]
    assert first.macs == 2 * 3 * 4 * 16 * (16 * 17 // 2)  # two products; batch, heads, size of a head, pairs
    assert first.inputs == first.outputs == 3 * 16 * 64
    assert first.cached == first.fresh == 2 * 3 * 2 * 16 * 16  # keys and values, of 2 heads, each once
    token = next(u for u in found["decode"].uses if u.kind == "attention")
    assert token.macs == 2 * 3 * 4 * 16 * 11
    assert token.cached == 2 * 3 * 2 * 11 * 16
    assert token.fresh == 2 * 3 * 2 * 16


def test_weights_of_a_prompt_and_of_a_token():
    found = count_phases(llama(), Load(batch=3, prompt=16, context=16))
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    for phase, tokens in (("prefill", 48), ("decode", 3)):
        uses = found[phase].uses
        products = [u for u in uses if u.kind == "product" and u.weights and u.path != "lm_head"]
        assert sum(u.macs for u in products) == 2 * tokens * layer
        (head,) = [u for u in uses if u.path == "lm_head"]
        assert head.macs == 3 * 64 * 96  # the last token's logits alone
        (rows,) = [u for u in uses if u.kind == "embedding"]
        assert rows.share == tokens / 96
        assert rows.weights == ("model.embed_tokens.weight",)


def test_a_window_bounds_attention():
    config = MistralConfig(**LLAMA, sliding_window=4)
    found = count_phases(on_meta(MistralForCausalLM, config), Load(batch=1, prompt=16, context=16))
    first, token = (next(u for u in found[p].uses if u.kind == "attention") for p in ("prefill", "decode"))
    assert first.macs == 2 * 4 * 16 * (1 + 2 + 3 + 13 * 4)
    assert token.macs == 2 * 4 * 16 * 4


@pytest.mark.parametrize(("queries", "keys", "window"), [(5, 5, None), (1, 7, None), (3, 9, 4), (6, 6, 1), (2, 5, 9)])
def test_pairs_are_those_of_a_mask(queries, keys, window):
    rows, columns = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    mask = (columns <= rows) & (columns > rows - (window or keys))
    assert pairs(queries, keys, window) == int(mask.sum())


def test_an_encoder_has_one_phase_and_counts_as_pytorch_does():
    config = BertConfig(**COMMON, intermediate_size=128)
    found = count_phases(on_meta(BertForMaskedLM, config), Load(batch=2, prompt=12, context=12))
    assert list(found) == ["prefill"]
    real = BertForMaskedLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        real.set_attn_implementation("eager")
        real(input_ids=torch.zeros(2, 12, dtype=torch.long))
    assert 2 * found["prefill"].macs == counter.get_total_flops()


def test_layers_of_transformers_own_are_counted():
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    found = count_phases(on_meta(GPT2LMHeadModel, config), Load(1, 8, 8))["prefill"]
    blocks = [u for u in found.uses if u.kind == "product" and u.path != "lm_head"]
    assert sum(u.macs for u in blocks) == 2 * 8 * 12 * 64 * 64


def test_experts_count_for_the_tokens_that_are_sent_to_them():
    config = MixtralConfig(**LLAMA, num_local_experts=8, num_experts_per_tok=2)
    found = count_phases(on_meta(MixtralForCausalLM, config), Load(batch=2, prompt=16, context=16))
    first, token = (next(u for u in found[p].uses if u.kind == "experts") for p in ("prefill", "decode"))
    assert first.path == "model.layers.0.mlp.experts"
    assert first.macs == 32 * 2 * (3 * 64 * 128)
    assert first.share == pytest.approx(1, abs=1e-3)
    assert token.macs == 2 * 2 * (3 * 64 * 128)
    assert token.share == pytest.approx(1 - 0.75**2)
    assert not [u for u in found["prefill"].uses if u.path == "model.layers.0.mlp.experts" and u.kind != "experts"]


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_what_cannot_be_counted_is_said():
    with pytest.raises(ValueError, match="expected a model on the meta device, got parameters with values"):
        count(nn.Linear(2, 2), {"input": torch.empty(1, 2, device="meta")})
    with torch.device("meta"):
        model, x = Looks(), torch.empty(2, 4)
    with pytest.raises(ValueError, match="Looks: expected a forward that runs on shapes alone"):
        count(model, {"x": x})
    t5 = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="expected a decoder or an encoder of text, got an encoder-decoder"):
        count_phases(on_meta(T5ForConditionalGeneration, t5), Load(1, 4, 4))
    with pytest.raises(ValueError, match="expected at most 64 tokens, got 65"):
        count_phases(llama(), Load(1, 65, 16))
    with pytest.raises(ValueError, match="expected at most 64 tokens, got 65"):
        count_phases(llama(), Load(1, 16, 64))
    with pytest.raises(ValueError, match="roofline: batch: expected 1 or more, got 0"):
        Load(0, 1, 1)


def test_a_layer_takes_the_longer_of_computing_and_moving():
    found = roofline(llama(), QuantConfig.parse("ste", "w4a16-g32"), TOY, Load(2, 16, 16))
    layer = next(g for g in found.layers if g.path == "model.layers.1.mlp.up_proj")
    assert layer.parts == {"codes": 128 * 64 // 2, "scales": 128 * 2 * 2, "shapes": 16}
    cost = layer.phases["prefill"]
    assert cost.operations == 2 * 32 * 64 * 128
    assert cost.bytes == layer.bytes + 32 * (64 + 128) * 2
    assert cost.memory_seconds == pytest.approx(cost.bytes / 1e10)
    assert cost.compute_seconds == pytest.approx(cost.operations / 1e12)
    assert cost.seconds == cost.memory_seconds
    assert cost.bound == "memory"
    assert cost.intensity == pytest.approx(cost.operations / cost.bytes)
    slow = roofline(llama(), QuantConfig.parse("ste", "w4a16-g32"), Hardware("slow", {"bfloat16": 1e9}, 1e10))
    same = next(g for g in slow.layers if g.path == "model.layers.1.mlp.up_proj").phases["decode"]
    assert (same.bound, same.seconds) == ("compute", pytest.approx(2 * 64 * 128 / 1e9))
    assert found.total.phases["decode"].seconds == pytest.approx(sum(g.phases["decode"].seconds for g in found.groups))


def test_normalizations_move_their_weights_and_a_tied_head_is_held_once():
    tied = roofline(llama(tie_word_embeddings=True), None, TOY, Load(1, 4, 4))
    free = roofline(llama(), None, TOY, Load(1, 4, 4))
    table = 96 * 64 * 2
    assert free.total.bytes - tied.total.bytes == table
    for found, held in ((tied, 0), (free, table)):
        head = next(g for g in found.layers if g.path == "lm_head")
        assert head.bytes == held
        assert head.phases["decode"].bytes == table + 2 * (64 + 96)
        norm = next(g for g in found.layers if g.path == "model.norm")
        assert norm.phases["decode"].bytes == norm.bytes == 128
    parts = sum(p.numel() for p in llama().parameters()) * 2
    assert free.total.bytes == parts


def test_the_scheme_decides_the_arithmetic():
    def kinds(scheme: str, name: str) -> tuple[set[str], tuple[str, ...]]:
        found = roofline(llama(), QuantConfig.parse("ste", scheme), HARDWARE[name], Load(1, 4, 4))
        layer = next(g for g in found.layers if g.path == "model.layers.0.mlp.up_proj")
        return {*layer.arithmetic}, found.notes

    assert kinds("w4a16-g32", "h100") == ({"bfloat16"}, ())
    assert kinds("w8a8", "h100") == ({"int8"}, ())
    assert kinds("fp8", "h100") == ({"fp8"}, ())
    assert kinds("mxfp8", "h200") == ({"fp8"}, ())
    note = "A100 80GB SXM has no fp8 arithmetic: computed in bfloat16"
    assert kinds("fp8", "a100") == ({"bfloat16"}, (note,))
    found = roofline(llama(), QuantConfig.parse("ste", "w8a8"), HARDWARE["h100"], Load(1, 4, 4))
    assert next(g for g in found.layers if g.path == "lm_head").arithmetic == ("bfloat16",)
    layer = next(g for g in found.layers if g.path == "model.layers.0.mlp.up_proj")
    assert layer.phases["prefill"].bytes == layer.bytes + 4 * (64 + 2 * 128)  # inputs in bytes, outputs in bfloat16


def test_keys_and_values_take_their_bits():
    load = Load(3, 8, 20)
    numbers = 2 * 2 * 3 * 2 * 16 * 21
    cases = [("w4a16-g32", None, 2), ("w4a16-g32", 8, 1), ("w4a16-g32-kv8", None, 1), ("w4a16-g32-kv8", 16, 2)]
    for scheme, bits, size in cases:
        found = roofline(llama(), QuantConfig.parse("ste", scheme), TOY, load, bits)
        assert found.total.cache == numbers * size
        assert found.kv_bits == 8 * size
        attention = next(g for g in found.layers if g.path == "model.layers.0.self_attn").phases["decode"]
        scales = 4 if "kv8" in scheme else 0
        assert attention.bytes == numbers * size / 2 + 2 * 3 * 2 * 16 * size + 2 * 3 * 64 * 2 + scales


def test_hardware_from_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("peak: {bfloat16: 1e14, int8: 2e14}\nbandwidth: 9e11\n")
    assert load_hardware(file) == Hardware("mine", {"bfloat16": 1e14, "int8": 2e14}, 9e11, None, str(file))


BAD = {
    "peak: {bf16: 1e14}\nbandwidth: 1e12": r"hardware 'mine': peak: expected one of .*, got 'bf16'",
    "peak: {bfloat16: fast}\nbandwidth: 1e12": "hardware 'mine': bfloat16: expected a number above 0, got 'fast'",
    "peak: {bfloat16: 1e14}\nbandwidth: -1": "bandwidth: expected a number above 0, got -1",
    "peak: {bfloat16: 1e14}\nbandwidth: 1e12\nmemory: .inf": "memory: expected a number above 0, got inf",
    "peak: {}\nbandwidth: 1e12": "peak: expected operations per second by type",
    "peak: {bfloat16: 1e14}": "expected a mapping with peak and bandwidth",
    "peak: {bfloat16: 1e14}\nbandwidth: 1e12\nprice: 3": "expected one of .*, got 'price'",
    "peak: [": "expected YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=BAD[text]):
        load_hardware(tmp_path / "mine.yaml")


def test_hardware_without_the_models_dtype():
    with pytest.raises(ValueError, match=r"hardware 'toy': expected a peak for float16, got \['bfloat16', 'int8'\]"):
        TOY.arithmetic("float16", "float16")


def test_this_machine_is_measured():
    found = measure(buffer=2**22, size=128)
    assert {*found.peak} == {"float32", "bfloat16", "int8"}
    assert all(value > 0 for value in (*found.peak.values(), found.bandwidth))
    assert "measured here" in found.source
