"""What fake quantization costs a training step, in time and in memory, ours and other libraries'.

Every candidate trains the same Llama in an interpreter of its own.  Those of one scheme and plain take steps in
turn, one at a time; a figure is the median over rounds of a step's time divided by plain's of the same round.
Processor time is kept too: with ``--threads 1`` it hardly feels what else the machine is doing.  Memory
is the peak of the resident set in one step over what was resident before the model was built, measured in a
process of its own in which every tensor above 64 KiB is mapped and unmapped by itself.

    python examples/benchmarks/overhead.py --peers-venv        # everything; creates .venv-peers once
    python examples/benchmarks/overhead.py --only ste pege     # plain and what matches
    python examples/benchmarks/overhead.py --table             # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "overhead.json"
PEERS = ("torchao==0.18.0", "nvidia-modelopt==0.47.0")
PEERS_NEED = ("torch", "transformers", "requests")  # requests: modelopt 0.47 imports it and does not ask for it
ELEMENT = {"theta": "element"}
CANDIDATES: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    **{
        f"ours {method} {scheme}": {
            "kind": "ours",
            "method": method.split()[0],
            "scheme": scheme,
            "options": (ELEMENT if "element" in method else {}) | ({"compile": True} if "compiled" in method else {}),
        }
        for scheme, methods in {
            "w4a16-g32": ("ste", "lsq", "ewgs", "pege", "pege element"),
            "w8a8": ("ste", "pege"),
            "w8a8-static": ("ste", "lsq", "pege"),
        }.items()
        for method in (f"{name}{way}" for name in methods for way in ("", " compiled"))
    },
    **{
        f"{library} {scheme}": {"kind": library, "scheme": scheme}
        for library in ("torchao", "modelopt")
        for scheme in ("w4a16-g32", "w8a8" if library == "torchao" else "w8a8-static")
    },
}


Round = dict[str, list[dict[str, float]]]  # candidate -> answers of its turns


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Worker:
    """A candidate's process; ``ask`` sends a command and waits for the answer."""

    def __init__(self, name: str, settings: dict[str, Any], python: str, mapped: bool = False) -> None:
        environment = dict(os.environ, HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
        if mapped:
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [python, str(HERE / "overhead_worker.py"), json.dumps(CANDIDATES[name]), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        self.facts = self.answer()

    def ask(self, command: str) -> dict[str, Any]:
        """Let it do one thing."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next line; its log if it died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.errors.read()[-3000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process and drop its log."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                pipe.close()


def peers_python(directory: Path) -> str:
    """Interpreter of the peers' environment, created with the versions this one runs."""
    python = directory / "bin" / "python"
    ready = directory / ".ready"
    if not ready.exists():
        say(f"creating {directory.name} for {', '.join(PEERS)}")
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *PEERS_NEED, *PEERS], check=True)
        ready.touch()
    return str(python)


def measure_memory(names: list[str], pythons: dict[str, str], settings: dict[str, Any]) -> dict[str, int]:
    """Peak bytes of a step by candidate."""
    peaks = {}
    for i, name in enumerate(names, 1):
        worker = Worker(name, settings, pythons[name], mapped=True)
        try:
            worker.ask("step")  # creates the optimizer's state and calibrates
            peaks[name] = int(worker.ask("memory")["peak"])
        finally:
            worker.close()
        say(f"memory {i}/{len(names)}  {name}: {peaks[name] / 2**20:.0f} MiB")
    return peaks


def measure_time(
    group: str, names: list[str], pythons: dict[str, str], settings: dict[str, Any], rounds: int, warmup: int
) -> tuple[list[Round], dict[str, Any]]:
    """Rounds of answers of a group of candidates (plain takes two turns in each), and versions."""
    workers: dict[str, Worker] = {}
    measured: list[Round] = []
    try:
        for i, name in enumerate(names, 1):
            workers[name] = Worker(name, settings, pythons[name])
            say(f"{group}: start {i}/{len(names)}  {name}")
        others = [n for n in names if n != "plain"]
        for r in range(-warmup, rounds):
            first, half = r % max(len(others), 1), len(others) // 2
            turn = others[first:] + others[:first]
            turn = ["plain", *turn[:half], "plain", *turn[half:]]
            answers: Round = {}
            for name in turn:
                answers.setdefault(name, []).append(workers[name].ask("step"))
            if r >= 0:
                measured.append(answers)
            plain = statistics.median(a["wall"] for a in answers["plain"])
            say(f"{group}: round {r + 1}/{rounds}  plain {plain:.2f} s" + ("" if r >= 0 else "  (warm-up)"))
        versions = {k: v for w in workers.values() for k, v in w.facts["versions"].items()}
    finally:
        for worker in workers.values():
            worker.close()
    return measured, versions


def summary(measured: list[Round], name: str) -> dict[str, float]:
    """Median and spread of a candidate's per-round ratios to plain, by wall clock and by processor time."""
    out = {"seconds": statistics.median(a["wall"] for answers in measured for a in answers[name])}
    for clock, label in (("wall", "ratio"), ("cpu", "cpu_ratio")):
        ratios = []
        for answers in measured:
            plain = statistics.median(a[clock] for a in answers["plain"])
            ratios += [a[clock] / plain for a in answers[name]]
        tenths = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 9
        out |= {label: statistics.median(ratios), f"{label}_10": tenths[0], f"{label}_90": tenths[-1]}
    return {key: round(value, 4) for key, value in out.items()}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    s = results["settings"]
    plain = results["candidates"]["plain"]
    lines = [
        f"Training step of a {s['layers']}-layer Llama (hidden {s['hidden']}, {s['batch']} x {s['tokens']} tokens, "
        f"float32, AdamW) on {results['machine']['processor']}, {s['threads']} threads; plain is "
        f"{plain['seconds']:.2f} s" + (f" and {plain['peak'] / 2**20:.0f} MiB" if "peak" in plain else "") + ". "
        f"Median of {s['rounds']} interleaved rounds, 10 to 90 % in brackets.",
        "",
        "| | scheme | time | | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, c in results["candidates"].items():
        who, scheme = name.rsplit(" ", 1) if " " in name else (name, "float32")
        memory = f"{c['peak'] / plain['peak']:.3f}" if "peak" in c else ""
        spread = f"{c['ratio_10']:.3f} to {c['ratio_90']:.3f}"
        lines.append(f"| {who} | {scheme} | {c['ratio']:.3f} | [{spread}] | {memory} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", help="keep candidates whose name holds one of these")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peers-python", help="interpreter that has torchao and nvidia-modelopt")
    parser.add_argument("--peers-venv", action="store_true", help="create .venv-peers and use it")
    for name, value in {"vocab": 2048, "hidden": 512, "intermediate": 1408, "layers": 4, "heads": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text())))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    peers = peers_python(ROOT / ".venv-peers") if args.peers_venv else args.peers_python
    names, pythons = [], {}
    for name, candidate in CANDIDATES.items():
        peer = candidate["kind"] in ("torchao", "modelopt")
        if (peer and not peers) or (args.only and name != "plain" and not any(o in name for o in args.only)):
            continue
        names.append(name)
        pythons[name] = peers if peer else sys.executable
    keys = ("vocab", "hidden", "intermediate", "layers", "heads", "batch", "tokens", "threads")
    settings = {key: getattr(args, key) for key in keys}
    peaks = {} if args.no_memory else measure_memory(names, pythons, settings)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(str(CANDIDATES[name].get("scheme", "")), []).append(name)
    plain, versions, figures = groups.pop(""), {}, {}
    everything: list[Round] = []
    for group, members in (groups or {"": []}).items():
        measured, found = measure_time(group, plain + members, pythons, settings, args.rounds, args.warmup)
        figures |= {name: summary(measured, name) for name in members}
        versions |= found
        everything += measured
    figures = {"plain": summary(everything, "plain"), **figures}
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions,
        "settings": {**settings, "dtype": "float32", "rounds": args.rounds, "warmup": args.warmup},
        "candidates": {n: f | ({"peak": peaks[n]} if peaks else {}) for n, f in figures.items()},
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
