"""``lightning-quant ptq`` on a checkpoint of 1.1 billion parameters: memory, time, and what a kill changes.

A float Llama of TinyLlama's shape is written with random weights and rounded in a process whose resident memory is read
from the kernel.  In the middle it gets a SIGKILL, and another process goes on.  With ``--twin`` the model is rounded
once more without interruption, and all bytes are compared.

    python examples/benchmarks/ptq_1b.py --dir DISK     # some 8 GB and half an hour
    python examples/benchmarks/ptq_1b.py --table        # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export_7b import GIB, folder_bytes, identical, memory, say, write
from machine import machine, save

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "ptq_1b.json"
SIZES = {"vocab": 32000, "hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv_heads": 4}


def start(args: argparse.Namespace, model: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command in a process of its own; without anything to go on from it starts at once."""
    words = ["ptq", model, out, "--resume", "--scheme", args.scheme, "--rounding", args.rounding]
    words += ["--samples", args.samples, "--length", args.length]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-m", "lightning_quant.cli", *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def watched(process: subprocess.Popen[bytes], until: Callable[[], bool] = lambda: False) -> dict[str, float]:
    """Seconds and peak memory until it ends, or is killed once ``until`` says so."""
    begin, peaks = time.perf_counter(), {"peak": 0, "anonymous": 0}
    while process.poll() is None:
        for key, value in memory(process).items():
            peaks[key] = max(peaks[key], value)
        if until():
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.05)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"ptq failed with status {process.returncode}")
    return {"seconds": time.perf_counter() - begin, **peaks}


def measure(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    model, out, twin = place / "model", place / "out", place / "twin"
    noted = out.with_name(f".{out.name}.rounding.json")

    def finished() -> int:
        return len(json.loads(noted.read_text(encoding="utf-8"))["shards"]) if noted.exists() else 0

    sizes = [value.numel() for _, value in write(model, {name: getattr(args, name) for name in SIZES}, 4 * GIB)]
    first = watched(start(args, model, out), lambda: finished() >= args.layers // 2)
    at = finished()
    say(f"killed with {at} parts finished: {first}")
    second = watched(start(args, model, out))
    say(f"resumed: {second}")
    made = {"parameters": sum(sizes), "bytes": folder_bytes(model), "out_bytes": folder_bytes(out)}
    found = {"first": first, "second": second, "killed_at": at, "identical": None}
    if args.twin:
        watched(start(args, model, twin))
        found["identical"] = identical(out, twin)
    return {**made, **found}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    f, s = results["figures"], results["settings"]
    halves = f["first"], f["second"]
    peak, anonymous = (max(half[key] for half in halves) / GIB for key in ("peak", "anonymous"))
    same = {True: "the same bytes as without a kill", False: "OTHER BYTES than without a kill", None: "to its end"}
    return (
        f"A Llama of {f['parameters'] / 1e9:.2f} billion parameters ({f['bytes'] / GIB:.2f} GiB in bfloat16, "
        f"{s['layers']} layers of {s['hidden']}) by `{s['rounding']}` to {s['scheme']}, on {s['samples']} rows of "
        f"{s['length']} tokens, with {s['threads']} thread(s) of {results['machine']['processor']}: "
        f"{sum(half['seconds'] for half in halves) / 60:.0f} minutes, at most {peak:.2f} GiB resident ({anonymous:.2f} "
        f"not of files). Killed with SIGKILL after {f['killed_at']} finished parts, and resumed {same[f['identical']]}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dir", type=Path, default=HERE.parents[1], help="on the disk to use; what is made is removed")
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--twin", action="store_true", help="round it once more without a kill, and compare")
    numbers = {"samples": 32, "length": 256, "threads": 2, **SIZES}
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="ptq-") as place:
        figures = measure(args, Path(place))
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "settings": {name: getattr(args, name) for name in ("scheme", "rounding", *numbers)},
        "figures": figures,
    }
    save(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
