"""The keys of a GGUF file that say what its tensors are to be computed with, from a transformers config."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import explain
from lightning_quant.export.gguf_names import Architecture, architecture

ROPE_FREQS = "rope_freqs.weight"
SLIDING = "sliding_attention"
YARN = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}


def check_config(model: nn.Module) -> None:
    """Refuse a config that asks for something llama.cpp does otherwise for this architecture, without a key for it.

    Raises:
        ValueError: See above; the message names the setting.
    """
    own, config = architecture(model), _config(model)

    def demand(setting: str, expected: object, got: object) -> None:
        cure = "llama.cpp computes nothing else here: use format='folded'."
        raise ValueError(explain(f"config.{setting} (format='gguf')", str(expected), repr(got), cure))

    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in own.activations:
        demand("hidden_act", own.activations[0], activation)
    if getattr(config, "attention_bias", False) and not own.bias:
        demand("attention_bias", False, True)
    if own.tied and not config.tie_word_embeddings:
        demand("tie_word_embeddings", True, False)
    for kind, rope in _ropes(config).items():
        known = (
            ("default", "linear") if kind == SLIDING or own.name == "phi3" else ("default", "linear", "llama3", "yarn")
        )
        if rope.get("rope_type", "default") not in known:
            demand("rope_parameters['rope_type']", f"one of {', '.join(known)}", rope["rope_type"])
        for key, default in YARN.items() if rope.get("rope_type") == "yarn" else ():
            if rope.get(key, default) != default:
                demand(f"rope_parameters[{key!r}]", default, rope[key])
        if kind == SLIDING and rope.get("factor", 1.0) != 1.0:
            demand("rope_parameters['sliding_attention']", "no scaling", rope)
    if own.window:
        query = config.head_dim
        if config.num_hidden_layers == own.large:
            query = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != query:
            demand("query_pre_attn_scalar", query, config.query_pre_attn_scalar)
        if getattr(config, "use_bidirectional_attention", False):
            demand("use_bidirectional_attention", False, True)
        capped = own.name == "gemma2"
        if (config.attn_logit_softcapping is not None) != capped:
            demand("attn_logit_softcapping", "a number" if capped else None, config.attn_logit_softcapping)
        if capped and config.final_logit_softcapping is None:
            demand("final_logit_softcapping", "a number", None)
    if own.name == "qwen3moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            demand("mlp_only_layers and decoder_sparse_step", "experts in every layer", config.mlp_only_layers)
        if not config.norm_topk_prob:
            demand("norm_topk_prob", True, False)


def add_settings(writer: Any, model: nn.Module) -> None:
    """Add what the architecture needs, under the keys that llama.cpp's own converter writes.

    Where llama.cpp has no sliding window for an architecture that has one, the context length is the window's, up to
    which both are the same.

    Args:
        writer: A ``GGUFWriter``.
        model: A model that ``check_config`` passed.
    """
    own, config = architecture(model), _config(model)
    head = _head_size(config)
    writer.add_name(type(model).__name__.removesuffix("ForCausalLM"))
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(own, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, own, config, head)
    if own.window:
        writer.add_sliding_window(config.sliding_window)
        sliding = [kind == SLIDING for kind in config.layer_types]
        if sliding != [(i + 1) % own.window != 0 for i in range(len(sliding))]:
            writer.add_sliding_window_pattern(sliding)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if own.name == "qwen3moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def extra_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that no parameter is: what Llama 3 divides its rotary frequencies by."""
    config = _config(model)
    rope = next(iter(_ropes(config).values()))
    if rope.get("rope_type") != "llama3":
        return {}
    size = _head_size(config)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    length = rope["original_max_position_embeddings"]
    wave = 2 * math.pi * float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    smooth = (length / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    far = torch.where(wave > length / low, torch.full_like(wave, factor), between)
    return {ROPE_FREQS: torch.where(wave < length / high, torch.ones_like(wave), far).float()}


def _add_rope(writer: Any, own: Architecture, config: Any, head: int) -> None:
    ropes = _ropes(config)
    rope = ropes.get("full_attention") or next(iter(ropes.values()))
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
    if own.window and SLIDING in ropes:
        writer.add_rope_freq_base_swa(float(ropes[SLIDING]["rope_theta"]))


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary settings by the kind of layer; those of all layers under ``full_attention``."""
    settings = config.rope_parameters
    return settings if "full_attention" in settings else {"full_attention": settings}


def _context(own: Architecture, config: Any) -> int:
    window = getattr(config, "sliding_window", None)
    if own.window or not window or not getattr(config, "use_sliding_window", True):
        return int(config.max_position_embeddings)
    return int(min(config.max_position_embeddings, window))


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _config(model: nn.Module) -> Any:
    return model.config
