"""Runs candidates in interpreters of their own, by turns with their baselines, and sums up what they answer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps.candidates import Candidates

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parents[1]
PEERS = ("torchao==0.18.0", "nvidia-modelopt==0.47.0")
PEERS_NEED = ("torch", "transformers", "requests")  # requests: modelopt 0.47 imports it and does not ask for it

Round = dict[str, list[dict[str, float]]]  # candidate -> answers of its turns


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Worker:
    """A candidate's process; ``ask`` sends a command and waits for the answer.

    Args:
        name: Of the candidate.
        candidate: What it is.
        settings: Of the model and the machine.
        python: Interpreter.
        baseline: What it is compared with, which then has a model in the same process.
        mapped: Map every larger tensor by itself.
    """

    def __init__(
        self,
        name: str,
        candidate: dict[str, Any],
        settings: dict[str, Any],
        python: str,
        baseline: dict[str, Any] | None = None,
        mapped: bool = False,
    ) -> None:
        environment = dict(os.environ, HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
        if mapped:
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [python, "-m", "steps.worker", *map(json.dumps, (candidate, settings, baseline))],
            cwd=HERE,
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
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its log says why
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next line; its log if it died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            log = self.errors.read()[-3000:]
            self.close()
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{log}")
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


@dataclass
class Run:
    """One measurement of some candidates.

    Attributes:
        candidates: What is measured.
        settings: Of the model and the machine.
        rounds: Rounds of turns that count, after each start; 0: memory alone is measured.
        warmup: Rounds before them.
        starts: How often all interpreters are started anew.
        peers: Interpreter of the peers.
        memory: Measure the peaks of memory.
        profiled: Let the profiler say which share of a step is ours.
        found: Candidate -> its figures.
        failed: Candidate -> the last line of its log.
        versions: Packages' versions.
    """

    candidates: Candidates
    settings: dict[str, Any]
    rounds: int
    warmup: int
    starts: int = 1
    peers: str | None = None
    memory: bool = True
    profiled: bool = True
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def measure(self) -> dict[str, dict[str, Any]]:
        """Figures of everything, in the candidates' order; those that fail are listed in ``failed``."""
        measured: dict[str, list[list[Round]]] = {}
        pairs = {name: c["baseline"] for name, c in self.candidates.items() if "baseline" in c} if self.rounds else {}
        for i, (name, baseline) in enumerate(pairs.items(), 1):
            for start in range(1, self.starts + 1):
                label = f"{i}/{len(pairs)} {name}, start {start}/{self.starts}"
                try:
                    rounds = self.turns(label, name, baseline, look=start == self.starts)
                except RuntimeError as error:
                    self.failed[name] = str(error).strip().splitlines()[-1]
                    say(f"failed: {error}")
                    break
                for who in (baseline, name):
                    measured.setdefault(who, []).append(rounds)
        for name, starts in measured.items():
            if any(starts) and name not in self.failed:
                against = self.candidates[name].get("baseline", name)
                figures = summary([r for rounds in starts for r in rounds], name, against)
                each = [summary(rounds, name, against)["ratio"] for rounds in starts if rounds]
                by_start = {} if against == name else {"by_start": each}
                self.found[name] = {"baseline": against, **figures, **by_start, **self.found.get(name, {})}
        if self.memory:
            self.peaks([name for name in self.candidates if name in self.found or not self.rounds])
        self.found = {name: self.found[name] for name in self.candidates if name in self.found}
        return self.found

    def turns(self, label: str, name: str, baseline: str, look: bool) -> list[Round]:
        """Start an interpreter with a candidate and its baseline, and let either of them step first by turns.

        Args:
            label: Of the progress.
            name: The candidate.
            baseline: What it is compared with.
            look: Ask for shares at the end.
        """
        worker, measured = self._start(name, baseline), []
        self.versions |= worker.facts["versions"]
        try:
            for r in range(-self.warmup, self.rounds):
                order = [("base", baseline), ("step", name)]
                answers = {who: [worker.ask(command)] for command, who in (order if r % 2 else order[::-1])}
                measured += [answers] * (r >= 0)
                times = ", ".join(f"{answers[who][0]['wall']:.3f} s" for _, who in order)
                say(f"{label}: round {r + 1}/{self.rounds}  {times}" + "  (warm-up)" * (r < 0))
            if look:
                self._look(name, worker)
        finally:
            worker.close()
        return measured

    def peaks(self, names: list[str]) -> None:
        """Peak bytes of a step, each in a process of its own in which every larger tensor is mapped by itself."""
        for i, name in enumerate(names, 1):
            worker = self._start(name)
            try:
                worker.ask("step")  # creates the optimizer's state and calibrates
                self.found.setdefault(name, {})["peak"] = int(worker.ask("memory")["peak"])
            finally:
                worker.close()
            say(f"memory {i}/{len(names)}  {name}: {self.found[name]['peak'] / 2**20:.0f} MiB")

    def _start(self, name: str, baseline: str | None = None) -> Worker:
        """Its process, with the baseline in it or for its memory alone."""
        candidate = self.candidates[name]
        python = self.peers if candidate["kind"] in ("torchao", "modelopt") else sys.executable
        beside = None if baseline is None else self.candidates[baseline]
        return Worker(name, candidate, self.settings, python or sys.executable, beside, mapped=baseline is None)

    def _look(self, name: str, worker: Worker) -> None:
        """Shares of what is ours."""
        if self.profiled and self.candidates[name]["kind"] == "ours":
            try:
                self.found.setdefault(name, {})["share"] = worker.ask("profile")["shares"]
            except RuntimeError as error:  # its times are there all the same
                say(f"no shares: {error}")


def summary(measured: list[Round], name: str, baseline: str = "plain") -> dict[str, float]:
    """Median and spread of a candidate's per-round ratios to a baseline, by wall clock and by processor time."""
    out = {
        "rounds": len(measured),
        "seconds": statistics.median(a["wall"] for answers in measured for a in answers[name]),
    }
    for clock, label in (("wall", "ratio"), ("cpu", "cpu_ratio")):
        ratios = []
        for answers in measured:
            base = statistics.median(a[clock] for a in answers[baseline])
            ratios += [a[clock] / base for a in answers[name]]
        tenths = statistics.quantiles(ratios, n=10, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 9
        out |= {label: statistics.median(ratios), f"{label}_10": tenths[0], f"{label}_90": tenths[-1]}
    return {key: round(value, 4) for key, value in out.items()}
