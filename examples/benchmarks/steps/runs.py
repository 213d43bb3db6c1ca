"""Runs candidates in interpreters of their own, by turns, and sums up what they answer."""

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

from steps.candidates import Candidates, groups

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parents[1]
PEERS = ("torchao==0.18.0", "nvidia-modelopt==0.47.0")
PEERS_NEED = ("torch", "transformers", "requests")  # requests: modelopt 0.47 imports it and does not ask for it

Round = dict[str, list[dict[str, float]]]  # candidate -> answers of its turns


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Worker:
    """A candidate's process; ``ask`` sends a command and waits for the answer."""

    def __init__(
        self, name: str, candidate: dict[str, Any], settings: dict[str, Any], python: str, mapped: bool = False
    ) -> None:
        environment = dict(os.environ, HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
        if mapped:
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [python, "-m", "steps.worker", json.dumps(candidate), json.dumps(settings)],
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
        starts: How often all interpreters are started anew; one may be faster than another by a hundredth, for as long
            as it lives.
        peers: Interpreter of the peers.
        memory: Measure the peaks of memory.
        profiled: Let the profiler say which share of a step is ours.
        together: Candidates that run by turns with one baseline at a time; None: all of a scheme.
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
    together: int | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether models are on a GPU."""
        return self.settings["device"] == "cuda"

    def measure(self) -> dict[str, dict[str, Any]]:
        """Figures of everything, in the candidates' order; a baseline's are those of all its groups.

        Raises:
            RuntimeError: A baseline failed.  Others that do are listed in ``failed``.
        """
        measured: dict[str, list[list[Round]]] = {}
        for (baseline, scheme), names in groups(self.candidates).items():
            step = self.together or max(len(names), 1)
            for start in range(0, max(len(names), 1), step):
                some = names[start : start + step]
                for i in range(self.starts if self.rounds else 0):
                    label = f"{baseline} {scheme}".strip() + f" {i + 1}/{self.starts}" * (self.starts > 1)
                    rounds = self.turns(label, baseline, some, look=i + 1 == self.starts)
                    for name in (baseline, *some):
                        measured.setdefault(name, []).append([r for r in rounds if name in r])
        for name, starts in measured.items():
            if any(starts) and name not in self.failed:
                against = self.candidates[name].get("baseline", name)
                figures = summary([r for rounds in starts for r in rounds], name, against)
                each = [summary(rounds, name, against)["ratio"] for rounds in starts if rounds]
                self.found[name] = {"baseline": against, **figures, "by_start": each, **self.found.get(name, {})}
        if self.memory and not self.on_gpu:
            self.peaks([name for name in self.candidates if name in self.found or not self.rounds])
        self.found = {name: self.found[name] for name in self.candidates if name in self.found}
        return self.found

    def turns(self, label: str, baseline: str, names: list[str], look: bool = True) -> list[Round]:
        """Rounds in which the baseline steps twice and each candidate once, in an order that turns.

        Args:
            label: Of the progress.
            baseline: What all are compared with.
            names: The candidates.
            look: Ask for shares (and a GPU's memory) at the end.
        """
        workers: dict[str, Worker] = {}
        measured: list[Round] = []
        try:
            names = [name for name in names if name not in self.failed]
            for i, name in enumerate((baseline, *names)):
                say(f"{label}: start {i}/{len(names)}  {name}")
                self._trying(workers, name, name == baseline, lambda n=name: self._start(n))
            for r in range(-self.warmup, self.rounds):
                others = [n for n in names if n in workers]
                first, half = r % max(len(others), 1), len(others) // 2
                turn = others[first:] + others[:first]
                answers: Round = {}
                for name in [baseline, *turn[:half], baseline, *turn[half:]]:
                    answer = self._trying(workers, name, name == baseline, lambda n=name: workers[n].ask("step"))
                    if answer is not None:
                        answers.setdefault(name, []).append(answer)
                if r >= 0:
                    measured.append(answers)
                seconds = statistics.median(a["wall"] for a in answers[baseline])
                note = "" if r >= 0 else "  (warm-up)"
                say(f"{label}: round {r + 1}/{self.rounds}  {baseline} {seconds:.3f} s{note}")
            if look:
                self._look(workers)
        finally:
            for worker in workers.values():
                worker.close()
        return measured

    def peaks(self, names: list[str]) -> None:
        """Peak bytes of a step, each in a process of its own in which every larger tensor is mapped by itself."""
        for i, name in enumerate(names, 1):
            worker = self._start(name, mapped=True)
            try:
                worker.ask("step")  # creates the optimizer's state and calibrates
                self.found.setdefault(name, {})["peak"] = int(worker.ask("memory")["peak"])
            finally:
                worker.close()
            say(f"memory {i}/{len(names)}  {name}: {self.found[name]['peak'] / 2**20:.0f} MiB")

    def _start(self, name: str, mapped: bool = False) -> Worker:
        candidate = self.candidates[name]
        python = self.peers if candidate["kind"] in ("torchao", "modelopt") else sys.executable
        return Worker(name, candidate, self.settings, python or sys.executable, mapped)

    def _trying(self, workers: dict[str, Worker], name: str, needed: bool, act: Any) -> Any:
        """What ``act`` returns; a candidate that fails is noted and left out, and a baseline ends everything."""
        try:
            result = act()
        except RuntimeError as error:
            if needed:
                raise
            workers.pop(name, None)
            self.failed[name] = str(error).strip().splitlines()[-1]
            say(f"failed: {error}")
            return None
        if isinstance(result, Worker):
            workers[name] = result
            self.versions |= result.facts["versions"]
        return result

    def _look(self, workers: dict[str, Worker]) -> None:
        """Shares of what is ours, and on a GPU the peaks, which need no process of their own there."""
        for name, worker in workers.items():
            if self.memory and self.on_gpu:
                self.found.setdefault(name, {})["peak"] = int(worker.ask("memory")["peak"])
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
