"""What this machine's processor can do: memory bandwidth and matrix products, measured in a few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from lightning_quant.progress import track
from lightning_quant.roofline.hardware import Hardware

BUFFER = 2**30  # bytes that are read: more than caches hold
SIZE = 2048  # rows and columns of the matrices
REPEATS = 5


def measure(buffer: int = BUFFER, size: int = SIZE) -> Hardware:
    """Measure the CPU, with as many threads as torch has; the best of some repeats counts.

    Bandwidth is the larger of reading (a dot product) and copying, whose bytes are counted once read and once written.

    Args:
        buffer: Bytes that are read, and as many written; more than the caches hold.
        size: Rows and columns of the matrices that are multiplied.
    """
    numbers = torch.ones(buffer // 4)
    copied = torch.empty_like(numbers)
    square = torch.ones(size, size)
    brain, codes = square.bfloat16(), square.to(torch.int8)
    runs: dict[str, tuple[Callable[[], object], float]] = {
        "reading": (lambda: torch.dot(numbers, numbers), buffer),
        "copying": (lambda: copied.copy_(numbers), 2 * buffer),
        "float32": (lambda: square @ square, 2 * size**3),
        "bfloat16": (lambda: brain @ brain, 2 * size**3),
        "int8": (lambda: torch._int_mm(codes, codes), 2 * size**3),
    }
    found = {name: work / _seconds(run) for name, (run, work) in track(list(runs.items()), "measuring the processor")}
    bandwidth = max(found.pop("reading"), found.pop("copying"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    threads = torch.get_num_threads()
    source = f"measured here, {threads} thread(s): {buffer / 2**20:.0f} MiB, matrices of {size} x {size}"
    return Hardware("cpu", found, bandwidth, memory, source)


def _seconds(run: Callable[[], object]) -> float:
    # of one thread the processor's time, which other work on the machine disturbs less
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    best = float("inf")
    for _ in range(REPEATS):
        start = now()
        run()
        best = min(best, now() - start)
    return best
