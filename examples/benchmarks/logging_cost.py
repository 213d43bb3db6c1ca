"""What logging quantization metrics costs a training step, as QuantCallback does it.

A Llama trains under our quantization; steps that measure and log to TensorBoard take turns with steps that do not,
in one process.  A figure is the median over rounds of a logged step's time divided by that of the round's other
steps; what it adds per step is that, less 1, over the steps from one log to the next.  Then whole intervals are
timed, with a log at their end and without, by turns.

    python examples/benchmarks/logging_cost.py             # everything
    python examples/benchmarks/logging_cost.py --table     # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from overhead import Round, say, summary
from steps.worker import CALIBRATION, LR, TOTAL_STEPS, build_model

from lightning_quant import QuantConfig, QuantController
from lightning_quant.optim import param_groups

RESULTS = Path(__file__).resolve().parent / "results" / "logging.json"
CANDIDATES = (("pege", "w8a8"), ("pege", "w4a16-g32"), ("lsq", "w8a8-static"))
KINDS = {"plain": {}, "means": {"measure": True}, "layers": {"measure": True, "layers": True}}
Step = Callable[..., dict[str, float]]


def training(method: str, scheme: str, settings: dict[str, Any], folder: str) -> Step:
    """A step that logs, or does not, and says how long it took."""
    from lightning.pytorch.loggers import TensorBoardLogger

    config = QuantConfig.parse(method, scheme, calibration=CALIBRATION)
    model, controller = build_model(settings), QuantController(config)
    controller.prepare(model)
    controller.begin(TOTAL_STEPS)
    optimizer = torch.optim.AdamW(param_groups(model, config, LR))
    batch = torch.randint(0, settings["vocab"], (settings["batch"], settings["tokens"]))
    logger = TensorBoardLogger(folder)

    def step(measure: bool = False, layers: bool = False) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        controller.on_step(controller.step + 1, measure=measure)
        model(input_ids=batch, labels=batch).loss.backward()
        controller.before_optimizer_step()
        optimizer.step()
        controller.after_optimizer_step()
        optimizer.zero_grad()
        if measure:
            metrics = {f"quant/{name}": value for name, value in controller.metrics(layers).items()}
            logger.log_metrics(metrics, step=controller.step)
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    return step


def rounds_of(step: Step, rounds: int, warmup: int) -> list[Round]:
    """Rounds of two plain steps and one of each other kind, in an order that turns."""
    others, measured = [k for k in KINDS if k != "plain"], []
    for r in range(-warmup, rounds):
        first, second = others if r % 2 else reversed(others)
        answers: Round = {}
        for kind in ("plain", first, "plain", second):
            answers.setdefault(kind, []).append(step(**KINDS[kind]))
        if r >= 0:
            measured.append(answers)
    return measured


def intervals(step: Step, every: int, pairs: int) -> list[float]:
    """Time of ``every`` steps that end with a log over that of as many without, by pairs."""

    def interval(measure: bool) -> float:
        return sum(step(measure=measure and i == every - 1)["wall"] for i in range(every))

    ratios = []
    for pair in range(pairs):
        times = {measure: interval(measure) for measure in ((True, False) if pair % 2 else (False, True))}
        ratios.append(times[True] / times[False])
        say(f"interval {pair + 1}/{pairs}: {ratios[-1]:.4f}")
    return ratios


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s, every = results["settings"], results["settings"]["every"]
    lines = [
        f"Logging every {every} steps, the default, in the training of a {s['layers']}-layer Llama (hidden "
        f"{s['hidden']}, {s['batch']} x {s['tokens']} tokens, float32, AdamW) on {results['machine']['processor']}, "
        f"{s['threads']} threads. Median of {s['rounds']} rounds of logged and other steps by turns, 10 to 90 % in "
        "brackets.",
        "",
        "| method | scheme | logged step | | added per step | with every layer's |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in results["candidates"].items():
        means, layers = c["means"], c["layers"]
        cells = [f"{means['ratio']:.3f}", f"[{means['ratio_10']:.3f} to {means['ratio_90']:.3f}]"]
        cells += [f"{(kind['ratio'] - 1) / every:+.2%}" for kind in (means, layers)]
        lines.append(f"| {' | '.join([*name.split(), *cells])} |")
    direct = results["intervals"]
    if direct:
        lines += [
            "",
            f"Whole intervals of {every} steps with their log over intervals without, {CANDIDATES[0][0]} "
            f"{CANDIDATES[0][1]}: median {statistics.median(direct):.4f} of {len(direct)} pairs, "
            f"{min(direct):.4f} to {max(direct):.4f}.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of whole intervals")
    parser.add_argument("--every", type=int, default=50, help="steps from one log to the next")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    sizes = {"vocab": 2048, "hidden": 512, "intermediate": 1408, "layers": 4, "heads": 8, "batch": 8, "tokens": 256}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    settings = {key: getattr(args, key) for key in (*sizes, "threads", "rounds", "warmup", "every")}
    figures, direct = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for method, scheme in CANDIDATES:
            step = training(method, scheme, settings, folder)
            measured = rounds_of(step, args.rounds, args.warmup)
            figures[f"{method} {scheme}"] = {kind: summary(measured, kind) for kind in KINDS}
            say(f"{method} {scheme}: a logged step takes {figures[f'{method} {scheme}']['means']['ratio']:.3f} steps")
            direct = direct or intervals(step, args.every, args.pairs)
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lightning")},
        "settings": {**settings, "dtype": "float32"},
        "candidates": figures,
        "intervals": [round(ratio, 4) for ratio in direct],
    }
    save(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
