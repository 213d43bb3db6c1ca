"""What DeepSpeed's ZeRO does to a QuantTrainer, one thing after the other; the tests look at what comes out.

python zero_run.py --out DIR CASE [CASE ...]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, TrainingArguments, default_data_collator

from hf_integration import QuantTrainer
from lightning_quant import QuantConfig
from lightning_quant.attach import quant_layers
from lightning_quant.zero import gathered, written
from tests.integration.processes import leave
from tests.integration.resume_run import quantizer_state, zero
from tests.integration.tiny import causal_lm, token_rows

STEPS = 6
STATIC = QuantConfig.parse("pege", "w4a8-static-g32", calibration=2)
DELAYED = QuantConfig.parse("pege", "w4a16-g32", delay=0.34, theta="element")


def make(out: Path, stage: int, config: QuantConfig, model: nn.Module | None = None, **more: Any) -> QuantTrainer:
    """A trainer with the global batch of 8 rows; ``settings`` in ``more`` go into DeepSpeed's config, stage 0: none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(out, stage, per_device_train_batch_size=8 // world, **more)
    return QuantTrainer(
        model=causal_lm() if model is None else model,
        args=args,
        train_dataset=Dataset.from_list(token_rows(48)),
        eval_dataset=Dataset.from_list(token_rows(8, seed=1)),
        data_collator=default_data_collator,
        quant=config,
    )


def arguments(out: Path, stage: int, settings: dict[str, Any] | None = None, **more: Any) -> TrainingArguments:
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        dataloader_pin_memory=False,
        seed=0,
        **({"deepspeed": zero(stage, **(settings or {}))} if stage else {}),
        **{"save_strategy": "no", **more},
    )


def said(trainer: QuantTrainer) -> dict[str, Any]:
    """What the log has, and the quantizers' state."""
    found: dict[str, Any] = {"quant": quantizer_state(trainer.model)}
    for name in ("loss", "eval_loss", "quant_flips"):
        found[name] = [entry[name] for entry in trainer.state.log_history if name in entry]
    return found


def configured(out: Path) -> dict[str, Any]:
    """Optimizer and scheduler are DeepSpeed's own."""
    adam = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"}
    settings = {"optimizer": adam, "scheduler": {"type": "WarmupLR", "params": warmup}}
    config = QuantConfig.parse("pege", "w4a16-g32", scale_lr=0.5)
    trainer = make(out, 2, config, settings=settings, weight_decay=0.1, warmup_steps=4)
    trainer.train()
    groups = trainer.deepspeed.optimizer.param_groups
    return said(trainer) | {"groups": [(g["lr"], g["weight_decay"], "quantizer" in g) for g in groups]}


def refused(out: Path) -> dict[str, Any]:
    """What is said about a scheduler that cannot be served, and about another config's checkpoint."""
    cycle = {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}}
    found = {}
    try:
        make(out, 2, QuantConfig.parse("pege", "w4a16-g32"), settings={"scheduler": cycle}).train()
    except ValueError as error:
        found["scheduler"] = str(error)
    trainer = make(out, 3, QuantConfig.parse("lsq", "w4a16-g32"), save_strategy="steps", save_steps=STEPS)
    trainer.train()
    optimizer = torch.optim.SGD([torch.zeros(4)])  # as a strategy that partitions first has it: one flat copy
    try:
        trainer.quant.split_groups([optimizer], [])
    except ValueError as error:
        found["groups"] = str(error)
    try:
        make(out, 3, QuantConfig.parse("lsq", "w8a16")).train(resume_from_checkpoint=True)
    except ValueError as error:
        found["config"] = str(error)
    return found


def best(out: Path) -> dict[str, Any]:
    """Evaluation in between, the best checkpoint loaded at the end, exported and saved."""
    every = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = make(out / "run", 3, STATIC, load_best_model_at_end=True, **every)
    trainer.train()
    trainer.save_model(str(out / "saved"))
    trainer.export(out / "export")
    return said(trainer) | {"best": str(trainer.state.best_model_checkpoint), "again": trainer.evaluate()["eval_loss"]}


def delayed(out: Path) -> dict[str, Any]:
    """Float at first, with Theta per element, whose update reads gradients that ZeRO has partitioned."""
    trainer = make(out, 3 if "WORLD_SIZE" in os.environ else 0, DELAYED)
    trainer.train()
    return said(trainer)


def adapters(out: Path) -> dict[str, Any]:
    """LoRA, whose adapters the base layer reads."""
    torch.manual_seed(0)
    model = get_peft_model(causal_lm(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0))
    trainer = make(out / "run", 3 if "WORLD_SIZE" in os.environ else 0, STATIC, model)
    trainer.train()
    trainer.save_model(str(out / "saved"))
    return said(trainer)


def loaded(out: Path) -> dict[str, Any]:
    """Weights partitioned while they are loaded: ranges are read off the whole ones."""
    kept = arguments(out, 3, per_device_train_batch_size=4)  # from here on from_pretrained partitions
    if os.environ["RANK"] == "0":
        causal_lm().save_pretrained(out / "float")
    torch.distributed.barrier()
    model = LlamaForCausalLM.from_pretrained(out / "float")
    parts = sum(hasattr(p, "ds_id") for p in model.parameters())
    trainer = make(out, 3, STATIC, model)
    begin = quantizer_state(model)
    shares = [entry.share for entry in trainer.quant_report.attached]
    trainer.train()
    return said(trainer) | {"begin": begin, "parts": parts, "shares": shares, "stage": kept.deepspeed_plugin.zero_stage}


def digits(out: Path) -> dict[str, Any]:
    """In bfloat16 the optimizer steps in float32: what is written there is what was written, and nothing else."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for stage in (2, 3):
        settings = {"bf16": {"enabled": True}}
        trainer = make(out, stage, QuantConfig.parse("lsq", "w4a16-g32"), settings=settings, bf16=True)
        trainer.train()
        scale = next(layer for _, layer in quant_layers(trainer.model)).weight_quant.scale
        before = safe_get_full_fp32_param(scale).clone()
        with written([scale]):
            scale.data[1, 1] = 0.5
        with gathered([scale]):
            low = scale.detach().clone()
        found[f"{stage}"] = {"before": before, "after": safe_get_full_fp32_param(scale).clone(), "low": low}
    return found


CASES = {f.__name__: f for f in (configured, refused, best, delayed, adapters, loaded, digits)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("cases", nargs="+", choices=CASES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in args.cases:
        (args.out / name).mkdir(exist_ok=True)
        found[name] = CASES[name](args.out / name)
    torch.save(found, args.out / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
    leave()
