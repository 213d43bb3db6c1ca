"""How the cost of fake quantization grows with the model and the batch, beside what is predicted.

A Llama trains at several hidden sizes, tokens per step and numbers of layers, one varied at a time: plain, and
quantized, by turns as in ``overhead.py``.  A prediction is a step's products at this machine's measured rate of matrix
products with AdamW at its memory's bandwidth, and beside it the bytes that quantizers move at the same bandwidth: see
``steps.bytes`` for the passes.  The same formulas then say what 8B and 70B Llamas would pay, here and on GPUs at the
peaks of their datasheets (where plain training falls short of the peak, the share is smaller).

    python examples/benchmarks/overhead_scaling.py                   # everything
    python examples/benchmarks/overhead_scaling.py --predict         # the predictions anew, for the last results
    python examples/benchmarks/overhead_scaling.py --table           # the table of the last results
    python examples/benchmarks/overhead_scaling.py --plots FOLDER    # a plot for each of the three
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from steps.ablation import config_of, surveyed
from steps.bytes import Survey, passes, plain_seconds, traffic
from steps.candidates import BASELINES, Candidates, ours
from steps.runs import Run, say

from lightning_quant.roofline import HARDWARE, Hardware, measure

RESULTS = Path(__file__).resolve().parent / "results" / "overhead_scaling.json"
VARIED = {"hidden": (256, 512, 1024), "tokens": (256, 1024, 4096), "layers": (1, 2, 4, 8)}
TITLES = {"hidden": "hidden size", "tokens": "tokens per step", "layers": "layers"}
BASE = {"hidden": 512, "tokens": 1024, "layers": 4}
SEQUENCE = 256
LARGE = {
    "Llama 8B": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "Llama 70B": {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "vocab": 128256},
}
LARGE_BATCH = {"batch": 4, "tokens": 2048}
GPUS = ("h100", "h200")
OURS: Candidates = {
    f"ours {method} {scheme}": ours(method, scheme, compiled=True)
    for method, scheme in (("ste", "w4a16-g32"), ("pege", "w4a16-g32"), ("ste", "w8a8"))
}


def model_settings(point: Mapping[str, int], threads: int) -> dict[str, Any]:
    """Settings of ``steps.worker`` for one point; ``tokens`` there are a sequence's."""
    hidden, batch = point["hidden"], max(1, point["tokens"] // SEQUENCE)
    fields = {"vocab": 2048, "hidden": hidden, "intermediate": hidden * 11 // 4, "heads": max(1, hidden // 64)}
    fields |= {"layers": point["layers"], "batch": batch, "tokens": point["tokens"] // batch}
    return {"model": "llama", **fields, **place(threads)}


def place(threads: int) -> dict[str, Any]:
    return {"threads": threads, "dtype": "float32", "device": "cpu", "compile_model": False}


def points(varied: Mapping[str, tuple[int, ...]], base: Mapping[str, int]) -> list[dict[str, int]]:
    """The base and every point that differs from it in one thing, each once."""
    found = [dict(base)]
    for name, values in varied.items():
        found += [{**base, name: value} for value in values if value != base[name]]
    return found


def work_of(settings: dict[str, Any]) -> dict[str, Survey]:
    """What a model of these settings has to do under each scheme."""
    schemes = {candidate["scheme"]: candidate for candidate in OURS.values()}
    return {scheme: surveyed(candidate, settings) for scheme, candidate in schemes.items()}


def prediction(work: Mapping[str, Survey], hardware: Hardware, dtype: str = "float32") -> dict[str, float]:
    """Seconds of a plain step, and what each of ours adds, by name.

    Args:
        work: See ``work_of``.
        hardware: Its peak for ``dtype`` and its bandwidth are used.
        dtype: Of weights, inputs and gradients.
    """
    width = getattr(torch, dtype).itemsize
    found: dict[str, float] = {}
    for name, candidate in OURS.items():
        mine = work[candidate["scheme"]]
        found["plain"] = plain_seconds(mine, hardware.bandwidth, hardware.peak[dtype], width)
        found[name] = traffic(mine, passes(config_of(candidate)), width).moved / hardware.bandwidth
    return found


def predict(results: dict[str, Any]) -> dict[str, Any]:
    """The results with all predictions made anew from the machine's figures in them."""
    hardware = Hardware("here", results["hardware"]["peak"], results["hardware"]["bandwidth"])
    threads = results["settings"]["threads"]
    for row in results["points"]:
        row["predicted"] = prediction(work_of(model_settings(row["point"], threads)), hardware)
    large = {}
    for name, fields in LARGE.items():
        work = work_of({"model": "llama", **fields, **LARGE_BATCH, **place(threads)})
        large[name] = {"here, float32": prediction(work, hardware)}
        for gpu in GPUS:
            large[name][f"{HARDWARE[gpu].name}, bfloat16"] = prediction(work, HARDWARE[gpu], "bfloat16")
    return {**results, "large": large}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every point."""
    torch.set_num_threads(args.threads)
    hardware = measure(buffer=args.buffer, size=args.size)
    say(f"{hardware.bandwidth / 1e9:.1f} GB/s, {hardware.peak['float32'] / 1e9:.0f} G float32 operations/s")
    measured, versions = [], {}
    varied = {name: tuple(getattr(args, name)) for name in VARIED}
    for point in points(varied, {name: getattr(args, f"base_{name}") for name in BASE}):
        say(f"{point}")
        candidates = {"plain": BASELINES["plain"], **OURS}
        settings = model_settings(point, args.threads)
        turns = Run(candidates, settings, args.rounds, args.warmup, memory=False, profiled=False)
        measured.append({"point": point, "measured": turns.measure()})
        versions |= turns.versions
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions,
        "settings": {"threads": args.threads, "rounds": args.rounds, "warmup": args.warmup},
        "hardware": {"bandwidth": hardware.bandwidth, "peak": {"float32": hardware.peak["float32"]}},
        "points": measured,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s, hardware = results["settings"], results["hardware"]
    names = list(OURS)
    lines = [
        f"Time of a step over plain's, measured and in brackets predicted, on {results['machine']['processor']}, "
        f"{s['threads']} threads ({hardware['bandwidth'] / 1e9:.1f} GB/s, {hardware['peak']['float32'] / 1e9:.0f} G "
        f"float32 operations/s), float32; medians of {s['rounds']} interleaved rounds.",
        "",
        f"| hidden | tokens | layers | plain, s | {' | '.join(n.removeprefix('ours ') for n in names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    for row in results["points"]:
        guess, found = row["predicted"], row["measured"]
        cells = [f"{row['point'][name]}" for name in VARIED]
        cells.append(f"{found['plain']['seconds']:.3f} ({guess['plain']:.3f})")
        cells += [f"{found[n]['ratio']:.3f} ({ratio(guess, n):.3f})" if n in found else "failed" for n in names]
        lines.append(f"| {' | '.join(cells)} |")
    tokens = LARGE_BATCH["batch"] * LARGE_BATCH["tokens"]
    lines += [
        "",
        f"Predicted for {tokens} tokens per step, whatever number of such processors share it:",
        "",
        f"| model | on | plain, s | {' | '.join(n.removeprefix('ours ') for n in names)} |",
        "|---" * (3 + len(names)) + "|",
    ]
    for model, places in results["large"].items():
        for where, guess in places.items():
            cells = [model, where, f"{guess['plain']:.3g}", *(f"{ratio(guess, n):.4f}" for n in names)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(guess: Mapping[str, float], name: str) -> float:
    """The predicted time of a step over plain's."""
    return 1 + guess[name] / guess["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--predict", action="store_true", help="make the predictions in --out anew and end")
    parser.add_argument("--plots", type=Path, help="write plots of --out into a folder and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--buffer", type=int, default=2**30, help="bytes that measure memory's bandwidth")
    parser.add_argument("--size", type=int, default=2048, help="of the matrices that measure products")
    for name, values in VARIED.items():
        parser.add_argument(f"--{name}", type=int, nargs="*", default=list(values))
        parser.add_argument(f"--base-{name}", type=int, default=BASE[name])
    args = parser.parse_args()
    if not (args.table or args.plots):
        results = json.loads(args.out.read_text(encoding="utf-8")) if args.predict else run(args)
        save(args.out, predict(results))
    results = json.loads(args.out.read_text(encoding="utf-8"))
    if args.plots:
        from steps.plots import scaling_plots

        print(*scaling_plots(results, args.plots))
        return
    print(table(results))


if __name__ == "__main__":
    main()
