"""Small models of the architectures that llama.cpp and this package share, with random weights, norms and biases."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64, "bos_token_id": 1}
GEMMA = {"head_dim": 16, "eos_token_id": 2}
ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
CAPPED = {"query_pre_attn_scalar": 16, "sliding_window": 8, "attn_implementation": "eager"}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {**ROPE, "original_max_position_embeddings": 16}},
    ),
    "llama-linear": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "qwen2-yarn": ("Qwen2ForCausalLM", "Qwen2Config", {"rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    "qwen3-128": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 128}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GEMMA),
    "gemma-2": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, **CAPPED}),
    "gemma-2-256": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"head_dim": 256, "sliding_window": 8, "attn_implementation": "eager"},
    ),
    "gemma-3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GEMMA, **CAPPED}),
    "phi-3": ("Phi3ForCausalLM", "Phi3Config", {}),
}


def small(family: str, seed: int = 0, **settings: Any) -> transformers.PreTrainedModel:
    """A two-layer model."""
    kind, config, own = FAMILIES[family]
    torch.manual_seed(seed)
    settings = {**SIZES, "eos_token_id": 2, **own, **settings}
    model: transformers.PreTrainedModel = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            spread = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator) * spread + (p.ndim == 1 and bool(p.mean() > 0.5)))
    return model
