"""What fake quantization costs a training step, in time and in memory, ours and other libraries'.

Every candidate trains a model in an interpreter of its own, in which its baseline (training in the same way without
quantization) has one as well; they take steps by turns, so that they share what differs between interpreters, and all
is started anew a few times.  A figure is the median over rounds of a step's time divided by the baseline's of the same
round.  ``plain, again`` is the baseline against itself: what it differs by from 1 is what this measurement can not see.
Processor time is kept too: with ``--threads 1`` it hardly feels what else the machine is doing.  Memory is the peak of
the resident set in one step over what was resident before the model was built, measured in a process of its own in
which every tensor above 64 KiB is mapped and unmapped by itself; on a GPU times are between its own events, and memory
is the allocator's peak.  The profiler then says which share of a step is ours.

    python examples/benchmarks/overhead.py --peers-venv        # the small Llama; creates .venv-peers once
    python examples/benchmarks/overhead.py --model vit-b       # another model; its part of the results is replaced
    python examples/benchmarks/overhead.py --only ste pege     # baselines and what matches
    python examples/benchmarks/overhead.py --ablate            # without one optimisation at a time
    python examples/benchmarks/overhead.py --model llama-1b --device cuda --dtype bfloat16 --compile-model
    python examples/benchmarks/overhead.py --merge FILE        # take over what was measured elsewhere
    python examples/benchmarks/overhead.py --table             # the tables of the last results
    python examples/benchmarks/overhead.py --plots FOLDER      # plots of them
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

from machine import machine, save
from steps.candidates import candidates, chosen
from steps.models import FAMILIES, sizes
from steps.runs import ROOT, Round, Run, peers_python, say, summary
from steps.table import NOTHING, ablation_table, share_table, table

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.json"
__all__ = ["NOTHING", "Round", "ablation_table", "say", "share_table", "summary", "table"]  # other benchmarks use them


def part_name(settings: dict[str, Any]) -> str:
    """Where a run's figures are kept: its model, and what is unusual about it."""
    words = [settings["model"], "cuda" * (settings["device"] == "cuda")]
    words += [settings["dtype"].removesuffix("float32"), "compiled" * settings["compile_model"]]
    return " ".join(filter(None, words))


def put(path: Path, name: str, kind: str, results: dict[str, Any], add: bool = False) -> dict[str, Any]:
    """Replace one part of the results file, in the order of ``FAMILIES``.

    Args:
        path: The file.
        name: See ``part_name``.
        kind: ``steps`` or ``ablation``.
        results: What was measured.
        add: Keep what was measured before and is not measured now (candidates, and of candidates peaks and shares), if
            the settings are the same but for the number of starts and of rounds.
    """
    models = read(path)["models"]
    part = models.setdefault(name, {})
    if add and kind in part:
        then = part[kind]["settings"]
        often = dict.fromkeys(("starts", "rounds", "warmup"))
        if {**then, **often} != {**results["settings"], **often}:
            raise SystemExit(f"--add: expected settings {then}, got others. Measure all of them anew.")
        for candidate in part[kind]["candidates"].values():
            candidate.setdefault("rounds", then["rounds"])
        held = part[kind]["candidates"]
        new = {name: {**held.get(name, {}), **figures} for name, figures in results["candidates"].items()}
        results = {**results, "candidates": {**held, **new}}
    part[kind] = results
    order = list(FAMILIES)
    models = dict(sorted(models.items(), key=lambda pair: (order.index(pair[0].split()[0]), pair[0])))
    save(path, {"models": models})
    return {"models": models}


def read(path: Path) -> dict[str, Any]:
    """The results file; nothing where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"models": {}}


def stamp(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Results with when, where and with what they were measured."""
    place = machine()
    if run.settings["device"] == "cuda":
        import torch

        place["gpu"] = torch.cuda.get_device_name()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": place,
        "versions": run.versions,
        "settings": {**run.settings, "starts": run.starts, "rounds": run.rounds, "warmup": run.warmup},
        "failed": run.failed,
        **found,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown tables of --out and end")
    parser.add_argument("--plots", type=Path, help="write plots of --out into a folder and end")
    parser.add_argument("--merge", type=Path, help="put the parts of another results file into --out and end")
    parser.add_argument("--add", action="store_true", help="keep what was measured before and is left out now")
    parser.add_argument("--ablate", action="store_true", help="measure without one optimisation at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--model", choices=FAMILIES, default="llama")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile-model", action="store_true", help="torch.compile of the whole model, plain and ours")
    parser.add_argument("--starts", type=int, default=3, help="how often all interpreters are started anew")
    parser.add_argument("--rounds", type=int, default=5, help="after each start; 0 with --add: memory alone")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted, after each start")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", help="keep candidates whose name holds one of these")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--peers-python", help="interpreter that has torchao and nvidia-modelopt")
    parser.add_argument("--peers-venv", action="store_true", help="create .venv-peers and use it")
    for name in dict.fromkeys(name for family in FAMILIES.values() for name in family.sizes):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="a size of the model, in place of its own")
    return parser.parse_args()


def measurement(args: argparse.Namespace) -> Run:
    """What the arguments ask for."""
    given = {name: getattr(args, name) for family in FAMILIES.values() for name in family.sizes}
    own = sizes(args.model, args.device, {name: value for name, value in given.items() if value is not None})
    settings = {"model": args.model, **own, "threads": args.threads, "dtype": args.dtype, "device": args.device}
    settings |= {"compile_model": args.compile_model, "optimizer": "fused AdamW"}
    if not args.rounds and (args.ablate or not args.add):
        raise SystemExit("--rounds 0: expected --add and no --ablate, got others. Memory alone is put beside times.")
    peers = peers_python(ROOT / ".venv-peers") if args.peers_venv else args.peers_python
    if args.ablate:
        from steps.ablation import ablated

        if args.model == "resnet-50":
            raise SystemExit(
                "--ablate: expected a model of Linear layers, got resnet-50. Convolutions recompute nothing."
            )
        everything = ablated(args.model)
    else:
        everything = candidates(args.model, args.compile_model)
    return Run(
        chosen(everything, args.only, peers is not None),
        settings,
        args.rounds,
        args.warmup,
        args.starts,
        peers,
        memory=not args.no_memory,
        profiled=not (args.no_profile or args.ablate or args.compile_model),
    )


def main() -> None:
    args = arguments()
    if args.plots:
        from steps.plots import steps_plot

        print(steps_plot(read(args.out), args.plots))
        return
    if args.merge:
        for name, part in read(args.merge)["models"].items():
            for kind, found in part.items():
                put(args.out, name, kind, found, args.add)
    elif not args.table:
        run = measurement(args)
        if args.ablate:
            from steps.ablation import run as ablation

            results, kind = stamp(run, ablation(run)), "ablation"
        else:
            results, kind = stamp(run, {"candidates": run.measure()}), "steps"
        put(args.out, part_name(run.settings), kind, results, args.add)
    results = read(args.out)
    print("\n\n".join(make(results) for make in (table, share_table, ablation_table)))


if __name__ == "__main__":
    main()
