"""Every method for a few steps, on one process or on several; the tests compare what comes out.

python methods_run.py --out DIR [--strategy one|ddp|fsdp2]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_quant import ESTIMATORS, QuantConfig, QuantController
from lightning_quant.attach import quantizers
from lightning_quant.distributed import whole
from lightning_quant.errors import AttachError

STEPS, ROWS = 10, 16


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def train(method: str, strategy: str) -> dict[str, object]:
    """Losses (means over all rows) and state of one method on the scheme it is made for."""
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
    controller.begin(STEPS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(STEPS, ROWS, 16, generator=torch.Generator().manual_seed(1))
    mine, losses = slice(rank * ROWS // world, (rank + 1) * ROWS // world), []
    for step in range(STEPS):
        controller.on_step(step)
        loss = (run(x[step, mine]) - x[step, mine, :8]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        controller.before_optimizer_step(optimizer)
        optimizer.step()
        controller.after_optimizer_step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean / world))
    state = {f"{p}.{n}": whole(t.detach()).clone() for p, q in quantizers(model) for n, t in q.state_dict().items()}
    state |= {n: whole(p.detach()).clone() for n, p in model.named_parameters() if "_quant." not in n}
    return {"losses": losses, "state": state}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", default="one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
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
