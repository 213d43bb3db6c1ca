"""A fast tokenizer of transformers under the keys that llama.cpp reads."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

from lightning_quant.errors import explain

# How text is cut before merging, by the name llama.cpp has for it.  Sources: llama.cpp's src/llama-vocab.cpp; the
# tokenizer.json files of GPT-2 (ByteLevel's own rule), Llama 3, Qwen 2, Mistral Nemo.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}{_TAIL}": "llama-bpe",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{_TAIL}": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int, config: Any) -> None:
    """Add the vocabulary, the ids of special tokens and the chat template.

    A model without a tokenizer gets ``no_vocab``: llama.cpp then takes token ids.  So does one whose tokenizer has a
    rule that llama.cpp has no name for, with a warning.

    Args:
        writer: A ``GGUFWriter``.
        tokenizer: A tokenizer of transformers, or None.
        vocabulary: Rows of the embedding; those without a token are filled up.
        config: The model's, for ids of special tokens.
    """
    keys = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id}
    keys |= {"pad": writer.add_pad_token_id, "unk": writer.add_unk_token_id}
    for word, add in keys.items():
        own = getattr(tokenizer, f"{word}_token_id", None)
        found = getattr(config, f"{word}_token_id", None) if own is None else own
        if found is not None and found != []:
            add(found[0] if isinstance(found, list) else found)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    try:
        _add_vocabulary(writer, tokenizer, vocabulary)
    except NotImplementedError as error:
        where, cure = "tokenizer (format='gguf')", "The file takes token ids; the tokenizer is saved beside it."
        expected = (
            "byte-level BPE as of GPT-2, Llama 3, Qwen 2 or Mistral Nemo, or BPE with byte fallback as of Llama 2"
        )
        warnings.warn(explain(where, expected, str(error), cure), stacklevel=2)
        writer.add_tokenizer_model("no_vocab")
        return
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_vocabulary(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise NotImplementedError(type(tokenizer).__name__)
    data = json.loads(backend.to_str())
    if data["model"]["type"] != "BPE":
        raise NotImplementedError(f"a {data['model']['type']} model")
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [UNUSED] * vocabulary
    added = {token["id"]: token for token in data["added_tokens"]}
    pieces = {index: token for token, index in data["model"]["vocab"].items()}
    pieces.update({index: token["content"] for index, token in added.items()})
    if max(pieces) >= vocabulary:
        raise NotImplementedError(f"{max(pieces) + 1} tokens for {vocabulary} rows of the embedding")
    plain = bool(data["model"].get("byte_fallback"))
    for index, piece in pieces.items():
        tokens[index], types[index] = piece, NORMAL
        if index in added:
            types[index] = CONTROL if added[index]["special"] else USER
        if plain and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            types[index] = BYTE
        if plain and piece == data["model"].get("unk_token"):
            types[index] = UNKNOWN
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    if plain:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prefixes(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(data["pre_tokenizer"]))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if plain:  # llama.cpp merges the pair that makes the token with the highest score
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        writer.add_token_scores([-float(ranks.get(piece, len(merges))) for piece in tokens])


def _pre(rule: Any) -> str:
    """llama.cpp's name for how text is cut."""
    steps = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule]
    kinds = [step and step["type"] for step in steps]
    last = steps[-1]
    if kinds == ["ByteLevel"] and last["use_regex"] and not last["add_prefix_space"]:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"] and steps[0]["behavior"] == "Isolated":
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise NotImplementedError(f"text cut by {json.dumps(rule)[:300]}")


def _prefixes(data: Any) -> bool:
    """Whether a space is put before the text."""
    rules = data["normalizer"] or {}
    first = (rules.get("normalizers") or [rules])[0]
    cut = data["pre_tokenizer"] or {}
    return first.get("type") == "Prepend" or cut.get("prepend_scheme") in ("first", "always")
