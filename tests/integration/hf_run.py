"""A QuantTrainer run that the tests start in processes of their own, kill, resume and compare.

python hf_run.py --out DIR [--die-at STEP] [--resume]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from hf_integration import QuantTrainer
from lightning_quant import QuantConfig
from lightning_quant.attach import quantizers
from tests.integration.processes import leave
from tests.integration.tiny import causal_lm, token_rows


class Die(TrainerCallback):
    """kill -9 in the middle of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--die-at", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--method", default="pege")
    parser.add_argument("--scheme", default="w4a16-g32")
    parser.add_argument("--theta", default="group")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"theta": args.theta} if args.method == "pege" else {}
    model = causal_lm().double() if args.double else causal_lm()
    if args.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.1))
    trainer = QuantTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "run"),
            max_steps=12,
            per_device_train_batch_size=8 // world // args.accumulate,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=3e-3,
            logging_steps=1,
            save_steps=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            ddp_backend="gloo" if world > 1 else None,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=Dataset.from_list(token_rows(64)),
        data_collator=default_data_collator,
        callbacks=[Die(args.die_at)] if args.die_at else [],
        quant=QuantConfig.parse(args.method, args.scheme, calibration=5, **options),
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    model = trainer.accelerator.unwrap_model(trainer.model)
    mine = {f"{p}.{n}": v for p, q in quantizers(model) for n, v in q.state_dict().items()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rank = int(os.environ.get("RANK", "0"))
    wrapped = type(trainer.model_wrapped).__name__
    torch.save(
        {"state": model.state_dict(), "quant": mine, "losses": losses, "wrapped": wrapped}, args.out / f"rank{rank}.pt"
    )


if __name__ == "__main__":
    main()
    leave()
