"""Learned rotations in two processes whose data differ: python spinquant_run.py --out DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_quant import QuantConfig, QuantController
from lightning_quant.distributed import rank
from tests.integration.text import batch
from tests.integration.tiny import causal_lm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    own = parser.parse_args()
    dist.init_process_group("gloo")
    model = causal_lm("llama").eval()
    config = QuantConfig.parse("ste", "w4a4-g32", setup=[{"name": "spinquant", "steps": 3}], setup_batches=2)
    QuantController(config).prepare(model, batches=lambda: [batch(2 * rank() + i) for i in range(2)])
    torch.save({k: v.clone() for k, v in model.state_dict().items()}, own.out / f"rank{rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
