"""A leaderboard of estimators: real tasks, paired seeds, swept learning rates, float controls, confidence intervals.

Every method starts from the same float checkpoint and sees the same data in the same order for as many steps, each at
the learning rate that is best for it on a held-out part.  What is measured is the hard low-bit model on a test part.

    python examples/benchmarks/accuracy.py --data DIR            # the ladder; goes on where it stopped
    python examples/benchmarks/accuracy.py --data DIR --all      # every method at every width: days of one core
    python examples/benchmarks/accuracy.py --quick               # digits and a small Llama, a quarter of an hour
    python examples/benchmarks/accuracy.py --search              # variants of PEGE's recipe, on digits and topics
    python examples/benchmarks/accuracy.py --search --tasks bert --methods "lam: 0"    # one of them, confirmed
    python examples/benchmarks/accuracy.py --tasks topics --budgets 0.01 0.1 1
    python examples/benchmarks/accuracy.py --list                # what there is to run, and what is left of it
    python examples/benchmarks/accuracy.py --table               # the tables of what is measured so far
    python examples/benchmarks/accuracy.py --data DIR --store MINE.jsonl --out MINE.json --against OTHER.json

``DIR`` holds ``tinyshakespeare/input.txt``, ``wikitext-2/valid.txt`` and ``test.txt``, and ``cifar10/train.parquet``
and ``test.parquet``; tasks without their files are left out.  Runs are kept line by line in ``--store`` and never
measured twice; another machine measures anew with a store of its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ladder import plan
from ladder.again import again
from ladder.methods import ALL, CONFIRM_TASKS, CORE, CORE_SCHEMES, METHODS, SEARCH, SEARCH_TASKS
from ladder.plan import Cell
from ladder.pool import Pool, clock, say
from ladder.store import Store
from ladder.summary import by_rate, recovered, summary
from ladder.tables import leaderboard, table
from ladder.tasks import TASKS
from machine import machine, save

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "accuracy.json"
STORE = HERE / "results" / "accuracy_runs.jsonl"
CACHE = HERE.parents[1] / "build" / "accuracy"
SHARES = (0.01, 0.1, 1.0)
LIBRARIES = ("torch", "transformers", "scikit-learn", "datasets")


def chosen(args: argparse.Namespace) -> list[Cell]:
    """The cells that the command line names."""
    if args.quick:
        return [c for c in core(args) if c.method not in plan.ROUNDED]
    if args.search:
        return plan.search(args.tasks, args.schemes, args.methods)
    if args.budgets:
        return plan.budgets(args.tasks, args.budgets, args.schemes, args.methods)
    return plan.ladder(args.tasks, args.schemes, args.methods, args.optimizers) if args.all else core(args)


def core(args: argparse.Namespace) -> list[Cell]:
    """What the table in README is of, as far as nothing else is asked for."""
    cells = plan.ladder(args.tasks, args.schemes, args.methods or [*CORE], args.optimizers or ["adamw"])
    return cells if args.schemes else [c for c in cells if c.scheme in (*CORE_SCHEMES[c.task], plan.FLOAT)]


def every() -> list[Cell]:
    """All that a summary may speak of."""
    tasks = list(TASKS)
    cells = plan.ladder(tasks, None, None, None) + plan.search(tasks, list(ALL), None)
    return cells + plan.budgets(tasks, SHARES, list(ALL), list(METHODS))


def summarised(cells: list[Cell], store: Store, seeds: int) -> dict[str, Any]:
    """The results file."""
    figures = summary(cells, store, seeds)
    tasks = dict.fromkeys(c["task"] for c in figures)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "settings": {"seeds": seeds, "tasks": {name: TASKS[name].settings() for name in tasks}},
        "runs": len(store.rows),
        "cells": figures,
        "recovered": recovered(figures),
        "by_rate": by_rate(cells, store),
    }


def listed(args: argparse.Namespace, cells: list[Cell], store: Store) -> str:
    """Cells by task and scheme, with the runs they still take and the hours of one core."""
    pool, out = Pool(store, args.data, args.cache, 1), []
    for task in args.tasks:
        own = [c for c in cells if c.task == task]
        runs, seconds = pool.left(own, args.seeds)
        done = sum(not c.left(store, args.seeds) for c in own)
        out.append(f"{task}: {len(own)} cells, {done} done, {runs} runs left, {clock(seconds)} of one core")
        for optimizer in dict.fromkeys(c.optimizer for c in own):
            for scheme in dict.fromkeys(c.scheme for c in own if c.optimizer == optimizer):
                labels = [c.label for c in own if (c.optimizer, c.scheme) == (optimizer, scheme)]
                out.append(f"  {optimizer} {scheme}: {', '.join(labels)}")
    return "\n".join(out)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--schemes", "--bits", nargs="+", choices=ALL)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SEARCH])
    parser.add_argument("--optimizers", nargs="+", choices=("adamw", "sgd"))
    parser.add_argument("--seeds", type=int, help="paired seeds per cell; default 5, with --quick or --search 3")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--data", type=Path, help="directory of the tasks' files")
    parser.add_argument("--device", default="cpu", help="for example cuda, with --workers 1 or 2")
    parser.add_argument("--full", action="store_true", help="ResNet-20 on all of CIFAR-10 instead of ResNet-8: a GPU's")
    parser.add_argument("--all", action="store_true", help="every method at every width with both optimizers")
    parser.add_argument("--quick", action="store_true", help="few methods, digits and topics, in a store of its own")
    parser.add_argument("--search", action="store_true", help="variants of PEGE's recipe, on the tasks for searching")
    parser.add_argument("--budgets", nargs="+", type=float, choices=SHARES, help="shares of the float training's steps")
    parser.add_argument("--list", action="store_true", help="what would be run, and how long it takes")
    parser.add_argument("--table", action="store_true", help="print the tables of what is measured, and end")
    parser.add_argument("--plots", action="store_true", help="draw what is measured, and end")
    parser.add_argument("--against", type=Path, help="other results: whether these say the same; exit status 1 if not")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE, help="float checkpoints")
    args = parser.parse_args(argv)
    args.store = args.store or (args.cache / "quick.jsonl" if args.quick else STORE)
    args.out = args.out or (args.cache / "quick.json" if args.quick else RESULTS)
    args.seeds = args.seeds or (3 if args.quick or args.search else 5)
    if args.tasks is None:
        args.tasks = [*SEARCH_TASKS] if args.quick or args.search else [*SEARCH_TASKS, *CONFIRM_TASKS]
    if args.full:
        args.tasks = ["cifar-full" if task == "cifar" else task for task in args.tasks]
    for task in list(args.tasks):
        missing = TASKS[task].missing(args.data)
        if missing:
            say(f"{task} is left out: no {', '.join(missing)} below --data {args.data or '(not given)'}")
            args.tasks.remove(task)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    store, cells = Store(args.store), chosen(args)
    there = json.loads(args.against.read_text(encoding="utf-8")) if args.against else None  # --out may be the same file
    if args.list:
        print(listed(args, cells, store))
        return
    seeds = args.seeds
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not (args.table or args.plots):
        try:
            Pool(store, args.data, args.cache, args.workers, args.device).measure(cells, seeds)
        except KeyboardInterrupt:
            say("\ninterrupted: what has finished is kept, the same command goes on from there")
    seeds = max([seeds, *(1 + row["seed"] % 100 for row in store.rows.values() if row["seed"] < plan.SWEEP_SEED)])
    results = summarised(cells if args.quick else every(), store, seeds)
    if args.plots:
        from ladder.plots import draw

        say("\n".join(map(str, draw(results, store, args.out.parent / "plots"))))
        return
    if not args.table:
        save(args.out, results)
        args.out.with_suffix(".md").write_text(leaderboard(results), encoding="utf-8")
    if there is not None:
        text, same = again(results, there)
        print(text)
        sys.exit(not same)
    print(table(results))


if __name__ == "__main__":
    main()
