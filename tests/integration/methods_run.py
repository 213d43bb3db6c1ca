"""Every method for a few steps, on one process or on several; the tests compare what comes out.

python methods_run.py --out DIR [--strategy one|ddp|fsdp2|zero1|zero2|zero3] [--single]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_quant import ESTIMATORS, QuantConfig, QuantController
from lightning_quant.attach import quantizers
from lightning_quant.distributed import whole
from lightning_quant.errors import AttachError
from lightning_quant.zero import gathered

STEPS, ROWS = 10, 16


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def train(method: str, strategy: str) -> dict[str, object]:
    """Losses (means over all rows) and state of one method on the scheme it is made for.

    Under ZeRO every rank sees all rows: the mean of equal gradients is that gradient to the last bit.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    scheme = ESTIMATORS[method].about.scheme
    model = net()
    try:
        QuantController(QuantConfig.parse(method, scheme)).prepare(net())
    except AttachError:  # groups of 128
        scheme += "-channel"
    controller = QuantController(QuantConfig.parse(method, scheme, calibration=3))
    controller.prepare(model)
    run: nn.Module = model
    if strategy == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif strategy == "ddp":
        run = DistributedDataParallel(model)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    if torch.get_default_dtype() == torch.float32:  # a power of 2: flat or not, a step rounds alike
        optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    engine: Any = None
    if strategy.startswith("zero"):
        import deepspeed

        run = engine = deepspeed.initialize(model=model, optimizer=optimizer, config=zero(int(strategy[-1]), world))[0]
        rank, world = 0, 1
    controller.begin(STEPS)
    x = torch.randn(STEPS, ROWS, 16, generator=torch.Generator().manual_seed(1))
    mine, losses = slice(rank * ROWS // world, (rank + 1) * ROWS // world), []
    for step in range(STEPS):
        controller.on_step(step)
        loss = (run(x[step, mine]) - x[step, mine, :8]).square().mean()
        if engine is None:
            optimizer.zero_grad()
            loss.backward()
            controller.before_optimizer_step(optimizer)
            optimizer.step()
        else:
            engine.backward(loss)
            controller.before_optimizer_step()
            engine.step()
        controller.after_optimizer_step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean / world))
    with gathered(model.parameters()):
        state = {f"{p}.{n}": whole(t.detach()).clone() for p, q in quantizers(model) for n, t in q.state_dict().items()}
        state |= {n: whole(p.detach()).clone() for n, p in model.named_parameters() if "_quant." not in n}
    return {"losses": losses, "state": state}


def zero(stage: int, world: int) -> dict[str, Any]:
    """DeepSpeed's settings for a stage of ZeRO."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": ROWS // world,
        "communication_data_type": "fp32",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", default="one")
    parser.add_argument("--single", action="store_true", help="float32, which is what ZeRO steps in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32 if args.single else torch.float64)
    if args.strategy != "one":
        dist.init_process_group("gloo")
    found: dict[str, object] = {}
    for method in ESTIMATORS:
        try:
            found[method] = train(method, args.strategy)
        except ValueError as error:
            found[method] = str(error)
    torch.save(found, args.out / f"rank{os.environ.get('RANK', '0')}.pt")
    if args.strategy != "one":
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
