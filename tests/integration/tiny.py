"""Small real models and data for the integration tests."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 96


def causal_lm(family: str = "llama", tied: bool = False, seed: int = 0) -> PreTrainedModel:
    """A two-layer model with random weights, norms and biases (a harder test than trained ones)."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"tie_word_embeddings": tied, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64}
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, **heads))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common, **heads))
    else:
        model = OPTForCausalLM(
            OPTConfig(**common, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64, dropout=0.0)
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            spread = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * spread + (p.ndim == 1 and bool(p.mean() > 0.5)))
    return model


def token_rows(rows: int, length: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of token ids that a model can learn something from (each token repeats)."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(3, VOCAB, (rows, length // 2), generator=generator)
    return [{"input_ids": r, "labels": r} for r in half.repeat_interleave(2, dim=1).tolist()]


def token_batch(rows: int = 2, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.tensor([r["input_ids"] for r in token_rows(rows, length, seed)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
