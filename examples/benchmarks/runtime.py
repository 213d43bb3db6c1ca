"""How much faster exports run on the low-bit kernels than in bfloat16, layer by layer and as a whole model.

A stack of Linear layers shaped like a Llama's MLP, of each kind more than ``--cold`` MiB so that no cache holds it, is
walked by all kinds in turn; a figure is the median over rounds of bfloat16's time over the kind's in the same round.
The same runs find the rows up to which few rows' kernels beat many rows' (``PACK_ROWS`` in
``lightning_quant/runtime``), and a whole Llama decodes and reads prompts.

    python examples/benchmarks/runtime.py             # everything
    python examples/benchmarks/runtime.py --table     # the table of the last results
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from overhead import say
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.runtime import convert, linear4, linear8
from lightning_quant.runtime.base import has_amx
from lightning_quant.runtime.choose import build, dense_layer
from lightning_quant.runtime.stored import InputRule, StoredLinear

RESULTS = Path(__file__).resolve().parent / "results" / "runtime.json"
KINDS = ("bf16", "int4", "int8", "w8a8")
SCHEMES = {"int4": "w4a16-g128", "int8": "w8a16", "w8a8": "w8a8"}
LIMITS = {"int4": linear4, "int8": linear8}
BYTES = {"bf16": 2.0, "int4": 0.5, "int8": 1.0, "w8a8": 1.0}
CPU = torch.device("cpu")
WALK = 4  # layers that one measurement passes


def now() -> float:
    """Seconds; with one thread of processor time, which other work on the machine disturbs less."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def layer(kind: str, out: int, width: int) -> nn.Module:
    """A layer with random integers."""
    bits, groups = (4, width // 128) if kind == "int4" else (8, 1)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, width), dtype=torch.int8)
    scale = torch.full((out, groups), 0.01, dtype=torch.bfloat16)
    stored = StoredLinear(codes, scale, bits, inputs=InputRule() if kind == "w8a8" else None)
    if kind == "bf16":
        return dense_layer(stored.dense(torch.bfloat16), None, None, (out, width), CPU)
    return build(kind, stored, torch.bfloat16, CPU)


def stack(kind: str, hidden: int, intermediate: int, cold: int) -> list[nn.Module]:
    """Up and down projections by turns, ``cold`` MiB of them or more, each with memory of its own."""
    pairs = int(cold * 2**20 / (2 * hidden * intermediate * BYTES[kind])) + WALK
    shapes = ((intermediate, hidden), (hidden, intermediate))
    if kind == "w8a8":  # copies of its weights share them
        return [layer(kind, *shape) for _ in range(pairs) for shape in shapes]
    first = [layer(kind, *shape) for shape in shapes]
    return [copy.deepcopy(one) for _ in range(pairs) for one in first]


def walker(layers: list[nn.Module], rows: int) -> Callable[[], float]:
    """A function that passes the next ``WALK`` layers and says how long it took."""
    inputs = {m.in_features: torch.randn(rows, m.in_features).bfloat16() for m in layers[:2]}
    place = 0

    @torch.no_grad()
    def walk() -> float:
        nonlocal place
        batch = [layers[(place + i) % len(layers)] for i in range(WALK)]
        place += WALK
        start = now()
        for one in batch:
            one(inputs[one.in_features])
        return now() - start

    return walk


def spread(values: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"ratio": statistics.median(values), "ratio_10": tenths[0], "ratio_90": tenths[-1]}


def by_turns(runs: dict[str, Callable[[], float]], rounds: int, base: str) -> dict[str, dict[str, float]]:
    """Time of ``base`` over that of each other, round by round, in an order that turns; also the base's seconds."""
    names, times = list(runs), []
    for r in range(-2, rounds):
        answers = {name: runs[name]() for name in (names if r % 2 else reversed(names))}
        if r >= 0:
            times.append(answers)
    found = {name: spread([t[base] / t[name] for t in times]) for name in names if name != base}
    return {base: {"seconds": statistics.median(t[base] for t in times)}, **found}


def limited(walk: Callable[[], float], kind: str, rows: int) -> Callable[[], float]:
    """The same with another limit of rows for the kernel."""

    def run() -> float:
        module, before = LIMITS[kind], LIMITS[kind].PACK_ROWS
        module.PACK_ROWS = dict.fromkeys(before, rows)
        try:
            return walk()
        finally:
            module.PACK_ROWS = before

    return run


def crossing(layers: list[nn.Module], kind: str, rows: list[int], rounds: int) -> dict[str, Any]:
    """Time of what many rows take over the few rows' kernel at several numbers of rows, and where that stops to win."""
    ratios = {}
    for n in rows:
        walk = walker(layers, n)
        runs = {"many": limited(walk, kind, 0), "few": limited(walk, kind, 10**9)}
        ratios[n] = by_turns(runs, rounds, "many")["few"]["ratio"]
    lost = [n for n in rows if ratios[n] < 1]
    return {
        "few_over_many": ratios,
        "wins_below": min(lost, default=None),
        "many": LIMITS[kind].many_rows(),
        "used": LIMITS[kind].PACK_ROWS[LIMITS[kind].many_rows()],
    }


def models(sizes: dict[str, int]) -> dict[str, nn.Module]:
    """A Llama in bfloat16 and on each kernel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {"hidden_size": sizes["model_hidden"], "intermediate_size": sizes["model_intermediate"]}
    fields |= {"num_hidden_layers": sizes["layers"], "num_attention_heads": sizes["model_hidden"] // 64}
    config = LlamaConfig(vocab_size=sizes["vocab"], **fields, eos_token_id=None, pad_token_id=0)
    found = {"bf16": LlamaForCausalLM(config).to(torch.bfloat16).eval()}
    for kind, scheme in SCHEMES.items():
        model = copy.deepcopy(found["bf16"])
        attach(model, QuantConfig.parse("ste", scheme))
        found[kind] = convert(model)
        say(f"{kind}: {found[kind].runtime_report}")
    return found


def decoding(model: Any, prompt: torch.Tensor, tokens: int) -> Callable[[], float]:
    """A function that reads a prompt, then decodes, and says how long the decoding took."""

    @torch.no_grad()
    def run() -> float:
        out = model(input_ids=prompt, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        start = now()
        for _ in range(tokens):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return now() - start

    return run


def reading(model: Any, prompt: torch.Tensor) -> Callable[[], float]:
    """A function that reads a prompt and says how long it took."""

    @torch.no_grad()
    def run() -> float:
        start = now()
        model(input_ids=prompt, use_cache=True)
        return now() - start

    return run


def cell(figures: dict[str, float]) -> str:
    return f"{figures['ratio']:.2f} [{figures['ratio_10']:.2f} to {figures['ratio_90']:.2f}]"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s, whole = results["settings"], results["model"]
    others = [kind for kind in KINDS if kind != "bf16"]
    tiles = "with" if results["amx"] else "without"
    lines = [
        f"Speed over bfloat16 (higher is faster) on {results['machine']['processor']} {tiles} AMX, {s['threads']} "
        f"thread(s): a stack of Linear layers ({s['hidden']} x {s['intermediate']} and back, {s['cold']} MiB of each "
        f"kind), and a Llama of {whole['parameters'] / 1e6:.0f} million weights. Median of {s['rounds']} interleaved "
        "rounds, 10 to 90 % in brackets.",
        "",
        f"| | {' | '.join(f'{kind} ({SCHEMES[kind]})' for kind in others)} |",
        "|---" * (len(others) + 1) + "|",
    ]
    for rows, figures in results["layers"].items():
        name = f"{rows} rows" if rows != "1" else "1 row (decoding)"
        lines.append(f"| {name} | {' | '.join(cell(figures[kind]) for kind in others)} |")
    speed = s["tokens"] / whole["decode"]["bf16"]["seconds"]
    for name, key in ((f"Llama, decoding ({speed:.0f} tokens/s in bfloat16)", "decode"), ("Llama, prompt", "prompt")):
        lines.append(f"| {name} | {' | '.join(cell(whole[key][kind]) for kind in others)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--limits", type=int, nargs="*", default=[2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 96])
    sizes = {"hidden": 2048, "intermediate": 5632, "cold": 640, "tokens": 16, "prompt": 64, "vocab": 8192}
    sizes |= {"layers": 12, "model_hidden": 1024, "model_intermediate": 2816}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    settings = {key: getattr(args, key) for key in (*sizes, "threads", "rounds")}
    layers = {kind: stack(kind, args.hidden, args.intermediate, args.cold) for kind in KINDS}
    figures = {}
    for rows in args.rows:
        runs = {kind: walker(layers[kind], rows) for kind in KINDS}
        figures[str(rows)] = by_turns(runs, args.rounds, "bf16")
        say(f"{rows} rows: " + ", ".join(f"{k} {f['ratio']:.2f}" for k, f in figures[str(rows)].items() if k != "bf16"))
    limits = {kind: crossing(layers[kind], kind, args.limits, max(3, args.rounds // 3)) for kind in LIMITS}
    say(f"limits: {limits}")
    layers.clear()
    llamas = models(settings)
    prompt = torch.randint(1, args.vocab, (1, args.prompt))
    runs = {kind: decoding(model, prompt, args.tokens) for kind, model in llamas.items()}
    decode = by_turns(runs, args.rounds, "bf16")
    read = by_turns({kind: reading(model, prompt) for kind, model in llamas.items()}, args.rounds, "bf16")
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "amx": has_amx() and "ONEDNN_MAX_CPU_ISA" not in os.environ,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "settings": settings,
        "layers": figures,
        "limits": limits,
        "model": {
            "parameters": sum(p.numel() for p in llamas["bf16"].parameters()),
            "decode": decode,
            "prompt": read,
        },
    }
    save(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
