"""QuantTrainer runs that save in every phase, each resumed from what was saved; the tests compare what comes out.

python resume_run.py --out DIR --kinds KIND [KIND ...]

A kind is one, ddp, fsdp2, zero1, zero2 or zero3; under torchrun one group of processes goes through all of them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from hf_integration import QuantTrainer
from lightning_quant import QuantConfig
from lightning_quant.attach import quantizers
from lightning_quant.checkpoint import STATE_FILE
from lightning_quant.distributed import whole
from lightning_quant.zero import gathered
from tests.integration.processes import leave
from tests.integration.tiny import causal_lm, token_rows

STEPS, CALIBRATION = 10, 4
PHASES = {"calibration": 2, "ramp": 5, "settled": 8}
LAM = {"curve": "cosine", "end": 0.1, "delay": 0.4, "until": 0.7}


class ShardedTrainer(QuantTrainer):
    """FSDP2 on CPUs: accelerate knows how, but asks for it on accelerators only and runs DDP elsewhere."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
        )
        self.is_fsdp_enabled = True


class Watch(TrainerCallback):
    """Saves at the end of every phase and notes what a run does: state at its begin, steps that observe, lam."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.begin: dict[str, Tensor] = {}
        self.observed: list[int] = []
        self.lam: dict[int, float] = {}

    def on_train_begin(self, args: object, state: Any, control: Any, **kwargs: object) -> None:
        self.begin = quantizer_state(self.trainer.model)

    def on_step_end(self, args: object, state: Any, control: Any, **kwargs: object) -> None:
        if any(q.observing for _, q in quantizers(self.trainer.model)):
            self.observed.append(state.global_step)
        self.lam[state.global_step] = self.trainer.quant.values()["lam"]
        control.should_save = state.global_step in PHASES.values()


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything the quantizers hold, whole on every rank, and whether ranges count as set."""
    with gathered(model.parameters()):
        state = {f"{p}.{n}": whole(t.detach()).clone() for p, q in quantizers(model) for n, t in q.state_dict().items()}
    return state | {f"{p}.ready": torch.tensor(q.ready) for p, q in quantizers(model)}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """DeepSpeed's settings for a stage of ZeRO on CPUs."""
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "communication_data_type": "fp32",
        **more,
    }


def make(root: Path, kind: str, accumulate: int, **settings: Any) -> tuple[QuantTrainer, Watch]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    args = TrainingArguments(
        output_dir=str(root),
        max_steps=STEPS,
        per_device_train_batch_size=8 // world // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
        dataloader_pin_memory=False,
        seed=0,
        **({"deepspeed": zero(int(kind[-1]))} if kind.startswith("zero") else {}),
        **settings,
    )
    watch = Watch()
    trainer = (ShardedTrainer if kind == "fsdp2" else QuantTrainer)(
        model=causal_lm(),
        args=args,
        train_dataset=Dataset.from_list(token_rows(48)),
        data_collator=default_data_collator,
        callbacks=[watch],
        quant=QuantConfig.parse("pege", "w4a8-static-g32", calibration=CALIBRATION, lam=LAM),
    )
    watch.trainer = trainer
    return trainer, watch


def train(root: Path, kind: str, accumulate: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """Losses, the state at the end, and what was watched."""
    trainer, watch = make(root, kind, accumulate)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    found = {
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e},
        "state": {name: value.detach().cpu().clone() for name, value in state.items()},
        "quant": quantizer_state(trainer.model),
        "begin": watch.begin,
        "observed": watch.observed,
        "lam": watch.lam,
        "sharded": sum(hasattr(p, "ds_id") or hasattr(p, "to_local") for p in trainer.model.parameters()),
    }
    trainer.accelerator.free_memory()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in args.kinds:
        for accumulate in (2,) if kind == "zero2" else (1, 2):
            root = args.out / f"{kind}{accumulate}"
            found[f"{kind}-{accumulate}"] = train(root, kind, accumulate)
            for phase, step in PHASES.items():
                saved = root / f"checkpoint-{step}"
                rest = train(root / phase, kind, accumulate, saved)
                rest["saved"] = load_file(saved / STATE_FILE)
                found[f"{kind}-{accumulate}-{phase}"] = rest
    torch.save(found, args.out / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
    leave()
