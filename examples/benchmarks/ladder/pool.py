"""Runs of the accuracy ladder over cores: worker processes of one thread each, a progress line, safe to interrupt."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from ladder.plan import Cell, queue
from ladder.store import Job, Store, key_of
from ladder.tasks import TASKS

GUESS = {"digits": 2.2, "topics": 18.0, "bert": 15.0, "cifar": 20.0}  # seconds of a run nobody has timed yet
TYPICAL = 25.0


def begin_worker(parent: int) -> None:
    """One thread; an interrupt is the parent's affair, and nothing goes on when the parent is gone."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process soon after its parent."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


@cache
def start(name: str, data: Path | None, folder: Path, device: str) -> object:
    """A task's start, once per process."""
    from ladder.run import prepare

    return prepare(name, data, folder, device)


def make_start(name: str, data: Path | None, folder: Path, device: str) -> float:
    """Make the float checkpoint if there is none; seconds."""
    begin = time.perf_counter()
    start(name, data, folder, device)
    return time.perf_counter() - begin


def work(job: Job, data: Path | None, folder: Path, curves: bool, device: str) -> dict[str, object]:
    """One run, in a worker."""
    from ladder.run import run

    return run(job, start(job.task, data, folder, device), curves, device)  # type: ignore[arg-type]


class Pool:
    """Measures cells until nothing is left.

    Args:
        store: Where figures go.
        data: The ``--data`` directory.
        folder: Where float checkpoints are kept.
        workers: Processes.
        device: Where models run.
    """

    def __init__(self, store: Store, data: Path | None, folder: Path, workers: int, device: str = "cpu") -> None:
        self.store, self.data, self.folder, self.workers, self.device = store, data, folder, workers, device
        self.failed: dict[str, str] = {}

    def measure(self, cells: Sequence[Cell], seeds: int) -> None:
        """Run what is missing.  Interrupted, it leaves what has finished in the store."""
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = "1"  # read when a worker imports torch
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"), begin_worker, (os.getpid(),))
        try:
            self._prepare(pool, list(dict.fromkeys(c.task for c in cells if c.left(self.store, seeds))))
            self._measure(pool, list(cells), seeds)
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()

    def _prepare(self, pool: ProcessPoolExecutor, tasks: list[str]) -> None:
        starts = {task: pool.submit(make_start, task, self.data, self.folder, self.device) for task in tasks}
        for task, future in starts.items():
            say(f"float checkpoint of {task}: {future.result():.0f} s")

    def _measure(self, pool: ProcessPoolExecutor, cells: list[Cell], seeds: int) -> None:
        running: dict[Future[dict[str, object]], tuple[Cell, Job]] = {}
        finished, began = 0, time.perf_counter()
        while True:
            cells = [c for c in cells if c.left(self.store, seeds)]
            busy = {key_of(job) for _, job in running.values()}
            for cell, job in queue(cells, self.store, seeds):
                if len(running) >= self.workers:
                    break
                if key_of(job) in busy or key_of(job) in self.failed:
                    continue
                busy.add(key_of(job))
                curves = job.seed == cell.seeds(1)[0]
                running[pool.submit(work, job, self.data, self.folder, curves, self.device)] = (cell, job)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, job = running.pop(future)
                error = future.exception()
                if isinstance(error, Exception):
                    self.failed[key_of(job)] = f"{cell.task} {cell.scheme} {cell.label}: {error}"
                    say(f"failed: {self.failed[key_of(job)]}")
                else:
                    self.store.add(job, future.result())
                finished += 1
                left, seconds = self.left(cells, seeds)
                show(finished, left, seconds / self.workers, time.perf_counter() - began, f"{cell.task} {cell.scheme}")
        show_end()

    def left(self, cells: Sequence[Cell], seeds: int) -> tuple[int, float]:
        """Runs left and their seconds, from the median of what was timed on the task with about as many steps."""
        times: dict[tuple[str, int], list[float]] = {}
        for row in self.store.rows.values():
            times.setdefault((row["task"], row["steps"]), []).append(row["wall"])
        runs, seconds = 0, 0.0
        for cell in cells:
            count = cell.left(self.store, seeds)
            known = times.get((cell.task, cell.steps))
            runs += count
            guess = GUESS.get(cell.task, TYPICAL) * max(0.1, cell.steps / TASKS[cell.task].steps)
            seconds += count * (statistics.median(known) if known else guess)
        return runs, seconds


def say(line: str) -> None:
    """A line above the progress."""
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)


_last = [0.0]


def show(done: int, left: int, seconds: float, elapsed: float, now: str) -> None:
    """The bar, anew in its line; without a terminal a line a minute."""
    if not sys.stderr.isatty() and elapsed - _last[0] < 60 and left:
        return
    _last[0] = elapsed
    total = done + left
    text = f" {done}/{total} runs, {clock(elapsed)} so far, about {clock(seconds)} left, {now}"
    width = max(10, min(40, shutil.get_terminal_size().columns - len(text) - 3))
    filled = width * done // max(1, total)
    bar = f"[{'#' * filled}{'.' * (width - filled)}]{text}"
    print(f"\r\x1b[K{bar}" if sys.stderr.isatty() else bar, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)
    sys.stderr.flush()


def show_end() -> None:
    if sys.stderr.isatty():
        print(file=sys.stderr)


def clock(seconds: float) -> str:
    """Hours and minutes.

    >>> clock(3720)
    '1:02 h'
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"
