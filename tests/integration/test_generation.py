"""What is written generates what training's model generates, token by token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_quant import QuantConfig
from lightning_quant.export import export
from tests.integration.test_export import train_a_little
from tests.integration.tiny import VOCAB, token_batch

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w2a16-g32-asym", "w8a8", "w8a8-static-kv8", "nvfp4a16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_greedy_tokens(tmp_path, family, scheme):
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    quant = QuantConfig.parse("pege", scheme, target="transformers", calibration=2)
    model = train_a_little(kind(config(**SIZES, initializer_range=0.3)), quant)
    export(model, tmp_path / "out", config=quant)
    reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = token_batch(rows=2)
    settings = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False, "pad_token_id": 0}
    ours, theirs = model.generate(**batch, **settings), reader.generate(**batch, **settings)
    assert ours.shape == (2, 216)
    assert torch.equal(ours, theirs)
    assert len(set(ours[0, 16:].tolist())) > 10  # no standstill, which any two models would share
