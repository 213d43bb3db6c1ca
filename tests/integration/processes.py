"""Start the run scripts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
DEEPSPEED = {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}  # accelerate leaves it out where told to use CPUs


def start(
    *words: object, processes: int = 1, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS``, under torchrun when ``processes`` > 1, to its end."""
    command = [sys.executable]
    if processes > 1:
        # standalone: torchrun itself binds a free port and keeps it, so that nobody takes it in between
        launch = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", processes]
        command += ["-m", "torch.distributed.run", *map(str, launch)]
    command += map(str, words)
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(env or {})}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=given, timeout=240, check=False)


def leave() -> None:
    """End the process group, a script's last act: threads of it that outlive the script make its exit an error."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(
    script: str, *args: object, processes: int = 1, expect: int = 0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run tests/integration/SCRIPT and check its exit status."""
    done = start(ROOT / "tests" / "integration" / script, *args, processes=processes, env=env)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def result(directory: Path, rank: int = 0) -> dict[str, object]:
    """What a run left behind."""
    return torch.load(directory / f"rank{rank}.pt", weights_only=True)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]
