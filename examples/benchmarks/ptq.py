"""Rounding without training, and as a start of it: the demo's language model at 3 and 2 bits, in groups of one seed.

The demo's small Llama is trained in float.  Then, at one width, its weights are rounded to nearest, by AdaRound, by
BRECQ (with its error plain, and weighted by the loss's squared gradients) and by GPTQ, on calibration rows that a seed
draws from the training text; and from each of these starts PEGE fine-tunes it with the same order of data.  What counts
is the validation loss of the hard low-bit model.

    python examples/benchmarks/ptq.py             # everything: some 45 minutes on two cores; goes on where it stopped
    python examples/benchmarks/ptq.py --table     # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from distill import Bench, say
from machine import machine, save

from lightning_quant import QuantConfig, attach
from lightning_quant.rounding import round_model

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "ptq.json"
SCHEMES = ("w3a16-g32", "w2a16-g32")
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # label in the table -> rounding and options
    "to nearest": ("rtn", {}),
    "AdaRound": ("adaround", {}),
    "BRECQ": ("brecq", {}),
    "BRECQ, importance": ("brecq", {"importance": True}),
    "GPTQ": ("gptq", {}),
}
ITERATED = ("adaround", "brecq")
FIRST_SEED = 3  # settings were chosen on seeds 0 to 2


def calibration(bench: Bench, seed: int) -> list[dict[str, torch.Tensor]]:
    """Rows of the training text, two in a batch, with labels."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(bench.train), generator=draw)[: bench.args.samples].tolist()
    ids = [torch.tensor([bench.train[i]["input_ids"], bench.train[j]["input_ids"]]) for i, j in pairs(chosen)]
    return [{"input_ids": row, "labels": row} for row in ids]


def pairs(chosen: list[int]) -> list[tuple[int, int]]:
    return list(zip(chosen[::2], chosen[1::2], strict=True))


@torch.no_grad()
def loss(bench: Bench, model: Any) -> float:
    """Validation loss."""
    model.eval()
    rows = torch.tensor([row["input_ids"] for row in bench.validation])
    return sum(float(model(input_ids=r, labels=r).loss) * len(r) for r in rows.split(32)) / len(rows)


def one(bench: Bench, weights: dict[str, torch.Tensor], scheme: str, arm: str, seed: int) -> dict[str, float]:
    """Loss after rounding, its seconds, and the loss after fine-tuning from there."""
    model = bench.model()
    model.load_state_dict(weights)
    config = QuantConfig.parse("pege", scheme)
    attach(model, config)
    rounding, options = ARMS[arm]
    if rounding in ITERATED:
        options = {**options, "iterations": bench.args.iterations}
    begin = time.perf_counter()
    round_model(model, None, calibration(bench, seed), rounding, seed=seed, **options)
    seconds = time.perf_counter() - begin
    rounded = loss(bench, model)
    tuned = bench.run(model, bench.args.steps, 1e-3, seed, quant=config)
    return {"rounded": rounded, "seconds": seconds, "tuned": tuned}


def measure(bench: Bench, cache: Path) -> dict[str, Any]:
    """Figures by scheme, rounding and seed; what the cache holds of the same settings is not measured again."""
    args = bench.args
    cache.mkdir(parents=True, exist_ok=True)
    trained = {name: getattr(args, name) for name in ("pretrain", "hidden", "layers", "vocab", "tokens", "batch")}
    kept = cache / ("-".join(["float", *map(str, trained.values())]) + ".pt")
    model = bench.model()
    if not kept.is_file():
        bench.run(model, args.pretrain, 5e-3, 0)
        temporary = kept.with_suffix(".tmp")
        torch.save(model.state_dict(), temporary)
        temporary.replace(kept)
    weights = torch.load(kept, weights_only=True)
    model.load_state_dict(weights)
    figures: dict[str, Any] = {"float": loss(bench, model), "runs": {}}
    say(f"float model: {figures['float']:.4f}")
    for scheme in SCHEMES:
        for arm in args.arms:
            found = figures["runs"].setdefault(scheme, {}).setdefault(arm, [])
            for seed in range(args.first_seed, args.first_seed + args.seeds):
                words = [scheme, arm.replace(" ", "_"), seed, args.samples, args.steps, args.iterations]
                file = cache / ("-".join(map(str, [*words, *trained.values()])) + ".json")
                if not file.is_file():
                    file.write_text(json.dumps(one(bench, weights, scheme, arm, seed)), encoding="utf-8")
                found.append(json.loads(file.read_text(encoding="utf-8")))
                say(f"{scheme}, {arm}, seed {seed}: {found[-1]}")
    return figures


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s, figures = results["settings"], results["figures"]
    lines = [
        f"Validation loss of the demo's model ({figures['float']:.4f} in float), rounded on {s['samples']} rows of "
        f"{s['tokens']} tokens (AdaRound and BRECQ: {s['iterations']} steps), and after {s['steps']} steps of PEGE "
        f"from there: means of {s['seeds']} seeds on {results['machine']['processor']}, differences to rounding to "
        "nearest with their standard errors; seconds are the least of the seeds'.",
        "",
        "| scheme | rounding | loss | difference | seconds | fine-tuned from there | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme, arms in figures["runs"].items():
        for arm, runs in arms.items():
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            base = arms["to nearest"]
            gaps = [difference(runs, base, key) if runs is not base else "" for key in ("rounded", "tuned")]
            cells = [scheme, arm, f"{mean['rounded']:.4f}", gaps[0], f"{min(run['seconds'] for run in runs):.1f}"]
            cells += [f"{mean['tuned']:.4f}", gaps[1]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(runs: list[dict[str, float]], base: list[dict[str, float]], key: str) -> str:
    gaps = [a[key] - b[key] for a, b in zip(runs, base, strict=True)]
    error = f" +- {statistics.stdev(gaps) / math.sqrt(len(gaps)):.4f}" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.4f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--cache", type=Path, default=HERE.parents[1] / "build" / "ptq", help="what is measured already"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    sizes = {
        "seeds": 3,
        "first-seed": FIRST_SEED,
        "samples": 128,
        "steps": 60,
        "iterations": 1000,
        "pretrain": 520,
        "hidden": 192,
    }
    sizes |= {"layers": 4, "vocab": 320, "tokens": 128, "batch": 16, "threads": os.cpu_count() or 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Bench(args, folder), args.cache)
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "table", "cache")},
        "figures": figures,
    }
    save(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
