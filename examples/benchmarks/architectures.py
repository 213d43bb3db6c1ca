"""What becomes of the architectures of transformers: a tiny model of each is trained, saved, exported and verified.

``python examples/benchmarks/architectures.py`` writes results/architectures.json; the tests run the same function.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from machine import machine
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from hf_integration import QuantTrainer
from lightning_quant import QuantConfig
from lightning_quant.export import VerifyReport, verify
from lightning_quant.report import Report

VOCAB, LENGTH = 96, 12
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
WIDE = {**SIZES, "intermediate_size": 128, "max_position_embeddings": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}  # fewer heads of keys and values than of queries
EXPERTS = {**GROUPED, "head_dim": 16, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
OPT = {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
T5 = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, **IDS}
VIT = {**SIZES, "image_size": 16, "patch_size": 8, "num_labels": 4, "intermediate_size": 128}
WHISPER = {
    **{"vocab_size": VOCAB, "num_mel_bins": 16, "d_model": 64, "max_source_positions": 16, "max_target_positions": 32},
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 128))},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1, **IDS},
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        title: As the table names it.
        model: Class of the model.
        config: Class of its config.
        sizes: Of the tiny model.
        kind: What it reads: ``tokens``, ``pairs`` (encoder and decoder), ``images`` or ``sound``.
        method: Trained with.
        scheme: Whose groups fit its rows.
    """

    title: str
    model: type[PreTrainedModel]
    config: type[hf.PretrainedConfig]
    sizes: dict[str, Any]
    kind: str = "tokens"
    method: str = "pege"
    scheme: str = "w4a16-g32"

    def build(self, seed: int = 0) -> PreTrainedModel:
        """A model of random weights."""
        torch.manual_seed(seed)
        return self.model(self.config(**self.sizes))

    def inputs(self, rows: int = 2, seed: int = 9) -> dict[str, Tensor]:
        """A batch without labels."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB, (rows, LENGTH), generator=draw)
        if self.kind == "images":
            return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw)}
        if self.kind == "sound":
            return {"input_features": torch.randn(rows, 16, 32, generator=draw), "decoder_input_ids": ids}
        if self.kind == "pairs":
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids.flip(0)}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Training data in memory."""
        batch = self.inputs(count, seed=3)
        ids = batch.pop("decoder_input_ids", batch.get("input_ids"))
        batch["labels"] = torch.arange(count) % 4 if ids is None else ids
        return [{name: t[i] for name, t in batch.items()} for i in range(count)]


FAMILIES = {
    "llama": Family("Llama", hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "qwen2": Family("Qwen 2", hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED, method="lsq"),
    "qwen3": Family("Qwen 3", hf.Qwen3ForCausalLM, hf.Qwen3Config, {**GROUPED, "head_dim": 16}),
    "mistral": Family("Mistral", hf.MistralForCausalLM, hf.MistralConfig, GROUPED, method="lsq"),
    "gemma2": Family("Gemma 2", hf.Gemma2ForCausalLM, hf.Gemma2Config, {**GROUPED, "head_dim": 16}),
    "gemma3": Family("Gemma 3 (text)", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**GROUPED, "head_dim": 16}),
    "phi3": Family("Phi-3", hf.Phi3ForCausalLM, hf.Phi3Config, GROUPED),
    "gpt2": Family("GPT-2", hf.GPT2LMHeadModel, hf.GPT2Config, GPT2, method="lsq"),
    "opt": Family("OPT", hf.OPTForCausalLM, hf.OPTConfig, OPT),
    "gpt_neox": Family("GPT-NeoX", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, WIDE, method="lsq"),
    "falcon": Family("Falcon", hf.FalconForCausalLM, hf.FalconConfig, SIZES),
    "bert": Family("BERT", hf.BertForMaskedLM, hf.BertConfig, WIDE, method="lsq"),
    "roberta": Family("RoBERTa", hf.RobertaForMaskedLM, hf.RobertaConfig, WIDE),
    "modernbert": Family(
        "ModernBERT",
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig,
        {**WIDE, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": Family(
        "T5", hf.T5ForConditionalGeneration, hf.T5Config, {**T5, "decoder_start_token_id": 0}, "pairs", method="lsq"
    ),
    "vit": Family("ViT", hf.ViTForImageClassification, hf.ViTConfig, VIT, "images"),
    "whisper": Family(
        "Whisper", hf.WhisperForConditionalGeneration, hf.WhisperConfig, WHISPER, "sound", scheme="w4a16-g16"
    ),
    "mixtral": Family("Mixtral", hf.MixtralForCausalLM, hf.MixtralConfig, {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": Family(
        "Qwen 3 MoE",
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64},
        method="lsq",
    ),
    "gpt_oss": Family("GPT-OSS", hf.GptOssForCausalLM, hf.GptOssConfig, {**EXPERTS, "num_local_experts": 4}),
}


@dataclass
class Outcome:
    """What was found.

    Attributes:
        model: The trained model, in evaluation.
        report: What was attached.
        saved: The training directory.
        format: Of the export.
        refused: Why the export is not compressed-tensors, or None.
        verified: The export beside the model.
    """

    model: PreTrainedModel
    report: Report
    saved: Path
    format: str
    refused: str | None
    verified: VerifyReport

    def row(self) -> dict[str, Any]:
        """Plain types, for JSON; exact shares, so that two runs agree."""
        return {
            "attached": round(self.report.coverage, 6),
            "layers": len(self.report.attached),
            "float": _left(self.report),
            "format": self.format,
            "refused": self.refused,
            "equal": self.verified.ok,
            "max_abs_diff": self.verified.max_abs_diff,
        }


def run(family: Family, directory: Path, steps: int = 3) -> Outcome:
    """Train the tiny model, save it, export it in the first format that holds it, verify the export.

    Args:
        family: Which.
        directory: An empty one.
        steps: Optimizer steps.
    """
    settings = TrainingArguments(
        output_dir=str(directory / "run"),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=0,
    )
    trainer = QuantTrainer(
        model=family.build(),
        args=settings,
        train_dataset=family.rows(16),
        data_collator=default_data_collator,
        quant=QuantConfig.parse(family.method, family.scheme),
    )
    trainer.train()
    trainer.save_model()
    format, refused = "compressed-tensors", None
    try:
        trainer.export(directory / "export")
    except ValueError as error:
        format, refused = "folded", str(error)
        trainer.export(directory / "export", format=format)
    trainer.model.eval()
    verified = verify(directory / "export", trainer.model, family.inputs())
    return Outcome(trainer.model, trainer.quant_report, directory / "run", format, refused, verified)


def _left(report: Report) -> list[dict[str, Any]]:
    """What stays in float, by reason, with its share of the weights; nothing that takes no share."""
    found: dict[str, tuple[list[str], float]] = {}
    for entry in report.excluded + report.unsupported:
        if entry.share:
            names, share = found.get(entry.what, ([], 0.0))
            name = entry.path.removesuffix(".weight").rpartition(".")[2]
            found[entry.what] = (names + [name] * (name not in names), share + entry.share)
    return [{"what": n, "why": why, "share": round(s, 6)} for why, (n, s) in found.items()]


def table(data: dict[str, Any]) -> str:
    """The README's table."""
    lines = [
        f"Tiny models of transformers {data['transformers']} with random weights, a few steps of `QuantTrainer`, "
        "saved, exported and read back by `verify`. Shares are of all parameters; what is missing to 100 % are vectors "
        "(biases, normalizations). `folded`: a layer is no Linear, or experts are fused on disk too.",
        "",
        "| family | quantized | matrices left in float | export | verify |",
        "|---" * 5 + "|",
    ]
    for name, row in data["families"].items():
        left = [f"{', '.join(f'`{n}`' for n in e['what'])} {e['share']:.1%} ({e['why']})" for e in row["float"]]
        verdict = "equal" if row["equal"] else f"differs by {row['max_abs_diff']:.3g}"
        title = FAMILIES[name].title
        lines.append(f"| {title} | {row['attached']:.1%} | {'; '.join(left)} | {row['format']} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    names = parser.parse_args().families
    rows = {}
    for name in names:
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            rows[name] = run(FAMILIES[name], Path(directory)).row()
        print(name, json.dumps(rows[name], indent=1), file=sys.stderr, flush=True)
    if names == list(FAMILIES):
        data = {"machine": machine(), "torch": torch.__version__, "transformers": hf.__version__, "families": rows}
        file = Path(__file__).resolve().parent / "results" / "architectures.json"
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
