"""How far the times that ``lightning-quant roofline --hardware cpu`` predicts are from those of the runtime's kernels.

The same stack of Linear layers and the same Llama as in ``runtime.py``, predicted from their shapes and this machine's
measured bandwidth and matrix products, then timed.  A figure is the measured median over the predicted time.

    python examples/benchmarks/roofline_check.py             # some minutes
    python examples/benchmarks/roofline_check.py --table     # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from overhead import say
from runtime import KINDS, SCHEMES, WALK, decoding, models, stack, walker
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quant import QuantConfig
from lightning_quant.roofline import Hardware, Load, Roofline, measure, roofline

RESULTS = Path(__file__).resolve().parent / "results" / "roofline.json"
PHASES = {"1": "decode", "256": "prefill"}


def predicted(hardware: Hardware, kind: str, load: Load, **sizes: int) -> Roofline:
    """The prediction for a Llama of these sizes."""
    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(num_attention_heads=heads, eos_token_id=None, pad_token_id=0, **sizes)
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    scheme = QuantConfig.parse("ste", SCHEMES[kind]) if kind in SCHEMES else None
    return roofline(model, scheme, hardware, load)


def walk_seconds(found: Roofline, phase: str) -> float:
    """Predicted time of ``WALK`` layers, up and down projections by turns."""
    groups = {group.path.rpartition(".")[2]: group for group in found.groups}
    pair = sum(groups[name].phases[phase].seconds / groups[name].count for name in ("up_proj", "down_proj"))
    return pair * WALK / 2


def compare(times: list[float], guess: float) -> dict[str, float]:
    return {"predicted": guess, "median": statistics.median(times), "best": min(times)}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s, hardware = results["settings"], results["hardware"]
    peaks = ", ".join(f"{name} {peak / 1e12:.2f}" for name, peak in hardware["peak"].items())
    processor = results["machine"]["processor"]
    lines = [
        f"Measured over predicted time (1: as predicted) on {processor}, {s['threads']} thread(s): "
        f"{hardware['bandwidth'] / 1e9:.1f} GB/s, {peaks} T operations/s. Median of {s['rounds']} rounds, in brackets "
        "the best one.",
        "",
        f"| | {' | '.join(KINDS)} |",
        "|---" * (len(KINDS) + 1) + "|",
    ]
    for name, row in results["rows"].items():
        cells = [
            f"{row[k]['median'] / row[k]['predicted']:.2f} [{row[k]['best'] / row[k]['predicted']:.2f}]" for k in KINDS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    sizes = {"hidden": 2048, "intermediate": 5632, "cold": 640, "tokens": 16, "prompt": 64, "vocab": 8192}
    sizes |= {"layers": 6, "model_hidden": 1024, "model_intermediate": 2816}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    settings = {key: getattr(args, key) for key in (*sizes, "threads", "rounds")}
    hardware = measure()
    say(f"{hardware.bandwidth / 1e9:.1f} GB/s, {dict(hardware.peak)}")
    rows: dict[str, Any] = {}
    shape = {"hidden_size": args.hidden, "intermediate_size": args.intermediate, "num_hidden_layers": 1}
    layers = {kind: stack(kind, args.hidden, args.intermediate, args.cold) for kind in KINDS}
    for count, phase in PHASES.items():
        walks = {kind: walker(layers[kind], int(count)) for kind in KINDS}
        times = by_turns_times(walks, args.rounds)
        load = Load(1, int(count), int(count))
        guesses = {kind: walk_seconds(predicted(hardware, kind, load, **shape), phase) for kind in KINDS}
        name = f"Linear layers, {count} row{'s' * (count != '1')}"
        rows[name] = {kind: compare(times[kind], guesses[kind]) for kind in KINDS}
        say(f"{name}: {rows[name]}")
    layers.clear()
    shape = {"hidden_size": args.model_hidden, "intermediate_size": args.model_intermediate}
    shape |= {"num_hidden_layers": args.layers, "vocab_size": args.vocab}
    prompt = torch.randint(1, args.vocab, (1, args.prompt))
    runs = {kind: decoding(model, prompt, args.tokens) for kind, model in models(settings).items()}
    times = by_turns_times(runs, args.rounds)
    load = Load(1, args.prompt, args.prompt + args.tokens // 2)
    rows[f"Llama of {args.layers} layers, hidden {args.model_hidden}, decoding"] = {
        kind: compare(
            [t / args.tokens for t in times[kind]],
            predicted(hardware, kind, load, **shape).total.phases["decode"].seconds,
        )
        for kind in KINDS
    }
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "settings": settings,
        "hardware": {"peak": dict(hardware.peak), "bandwidth": hardware.bandwidth, "source": hardware.source},
        "rows": rows,
    }
    save(args.out, results)
    print(table(results))


def by_turns_times(runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, in an order that turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for r in range(-2, rounds):
        for name in runs if r % 2 else reversed(runs):
            seconds = runs[name]()
            if r >= 0:
                found[name].append(seconds)
    return found


if __name__ == "__main__":
    main()
