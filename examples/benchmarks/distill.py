"""What a teacher adds: PEGE alone and with distillation, on the demo's language model, in groups of one seed.

The demo's small Llama is trained in float, and fine-tuned in float once.  Then each group of runs fine-tunes it at one
width with the same order of data: alone, with the free teacher (itself with its quantizers bypassed, as
``--quant_distill`` has it), and with the fine-tuned float model as its teacher (``--quant_teacher``); then with LoRA on
the frozen weights, alone and with the free teacher, which is the float model before fine-tuning there.  What counts is
the validation loss of the hard low-bit model.

    python examples/benchmarks/distill.py             # everything: some minutes on two cores
    python examples/benchmarks/distill.py --table     # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "distill.json"
sys.path.insert(0, str(HERE.parent))

from causal_lm import blocks, read_text, train_tokenizer  # noqa: E402

from hf_integration import QuantTrainer  # noqa: E402
from lightning_quant import QuantConfig  # noqa: E402

SCHEMES = ("w2a16-g32", "w3a16-g32")
ARMS = {  # what is trained, the teacher, and the arm it is compared with
    "none": ("all weights", "none", None),
    "free": ("all weights", "free: the weights in training, not rounded", "none"),
    "tuned": ("all weights", "the fine-tuned float model", "none"),
    "lora": ("LoRA", "none", None),
    "lora-free": ("LoRA", "free: the frozen weights, not rounded", "lora"),
}


class Bench:
    """Data and sizes that all runs share."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        self.args, self.folder = args, folder
        text = read_text(None)
        tokenizer = train_tokenizer(text, args.vocab)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cut = int(len(ids) * 0.9)
        self.train, self.validation = blocks(ids[:cut], args.tokens), blocks(ids[cut:], args.tokens)
        self.vocabulary = len(tokenizer)

    def model(self) -> LlamaForCausalLM:
        """The demo's."""
        torch.manual_seed(0)
        width = self.args.hidden
        sizes = {"hidden_size": width, "intermediate_size": (width * 8 // 3 + 63) // 64 * 64}
        heads = {"num_attention_heads": max(width // 64, 1), "num_key_value_heads": max(width // 128, 1)}
        depth = {"vocab_size": self.vocabulary, "num_hidden_layers": self.args.layers}
        return LlamaForCausalLM(LlamaConfig(**depth, **sizes, **heads))

    def run(self, model: LlamaForCausalLM, steps: int, lr: float, seed: int, **quant: Any) -> float:
        """Train; the validation loss."""
        args = TrainingArguments(
            self.folder,
            max_steps=steps,
            learning_rate=lr,
            warmup_steps=max(1, steps // 15),
            lr_scheduler_type="cosine",
            per_device_train_batch_size=self.args.batch,
            per_device_eval_batch_size=32,
            logging_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        trainer = QuantTrainer(
            model=model,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.validation,
            data_collator=default_data_collator,
            **quant,
        )
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


def measure(bench: Bench) -> dict[str, Any]:
    """Losses by scheme, arm and seed."""
    args = bench.args
    model = bench.model()
    start = bench.run(model, args.pretrain, 5e-3, 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = bench.run(model, args.steps, 1e-3, 0)
    say(f"float model: {start:.4f}, fine-tuned in float {tuned:.4f}")

    def fine_tuned(scheme: str, arm: str, seed: int) -> float:
        student: Any = bench.model()
        student.load_state_dict(weights)
        if arm.startswith("lora"):
            torch.manual_seed(seed)  # of A
            lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
            student = get_peft_model(student, lora)
        distill = {"weight": args.weight, "temperature": args.temperature} if ARMS[arm][2] else None
        quant = QuantConfig.parse("pege", scheme, distill=distill)
        return bench.run(student, args.steps, 1e-3, seed, quant=quant, teacher=model if arm == "tuned" else None)

    runs: dict[str, dict[str, list[float]]] = {}
    for scheme in SCHEMES:
        found = runs[scheme] = {arm: [] for arm in ARMS}
        for seed in range(args.seeds):
            for arm in ARMS:
                found[arm].append(fine_tuned(scheme, arm, seed))
                say(f"{scheme}, {arm}, seed {seed}: {found[arm][-1]:.4f}")
    return {"float": start, "tuned": tuned, "runs": runs}


def say(line: str) -> None:
    """Progress, beside the table."""
    print(line, file=sys.stderr, flush=True)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s, figures = results["settings"], results["figures"]
    lines = [
        f"Validation loss of the demo's model ({figures['float']:.4f} in float, {figures['tuned']:.4f} fine-tuned in "
        f"float) after {s['steps']} steps of PEGE (LoRA: rank {s['rank']}, all layers), with distillation of weight "
        f"{s['weight']:g} and temperature {s['temperature']:g}: means of {s['seeds']} seeds on "
        f"{results['machine']['processor']}.",
        "",
        "| scheme | trained | teacher | loss | difference | seed by seed |",
        "|---|---|---|---|---|---|",
    ]
    for scheme, arms in figures["runs"].items():
        for arm, (trained, teacher, base) in ARMS.items():
            cells = [scheme, trained, teacher, f"{statistics.mean(arms[arm]):.4f}", "", ""]
            if base is not None:
                pairs = [a - b for a, b in zip(arms[arm], arms[base], strict=True)]
                error = f" +- {statistics.stdev(pairs) / math.sqrt(len(pairs)):.4f}" if len(pairs) > 1 else ""
                cells[4:] = f"{statistics.mean(pairs):+.4f}{error}", ", ".join(f"{p:+.4f}" for p in pairs)
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "+-: the standard error of the mean difference."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    sizes = {
        "seeds": 3,
        "steps": 80,
        "pretrain": 520,
        "hidden": 192,
        "layers": 4,
        "vocab": 320,
        "tokens": 128,
        "rank": 16,
    }
    for name, value in {**sizes, "batch": 16, "rank": 16, "threads": os.cpu_count()}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Bench(args, folder))
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "table")},
        "figures": figures,
    }
    save(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
