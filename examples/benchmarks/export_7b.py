"""Export of a model of 7 billion parameters from its training directory: memory, time, and what five kills change.

A training directory of Llama's shape is written first, shard by shard, with random weights.  Its export runs in a
process of its own, whose resident memory is read from the kernel; the same bytes are then copied by ``cp``, input and
output.  At last the export runs once more, is killed five times with SIGKILL at random moments and resumed, and all
its bytes are compared.

    python examples/benchmarks/export_7b.py --dir DISK     # some 40 GB and minutes
    python examples/benchmarks/export_7b.py --table        # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quant import QuantConfig, attach
from lightning_quant.attach import quantizers, without_quantizers
from lightning_quant.checkpoint import save_quant_state
from lightning_quant.export.shards import Sink

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "export.json"
SIZES = {"vocab": 32000, "hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32}
GIB = 2**30


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def make(directory: Path, sizes: dict[str, int], scheme: str, shard_bytes: int) -> dict[str, int]:
    """Write a training directory; no more than one tensor is in memory.  Bytes and parameters, in all and largest."""
    model = on_meta(sizes)
    quant = QuantConfig.parse("ste", scheme)
    attach(model, quant, fit=False)
    scales = {path.removesuffix("_quant"): q for path, q in quantizers(model) if q.is_weight}
    shapes = []
    for name, value in write(directory, sizes, shard_bytes):
        shapes.append(value.numel())
        if name in scales:
            rows = scales[name].granularity.flat(value)
            scales[name].set_range(rows.amin(-1).float(), rows.amax(-1).float())
    save_quant_state(directory, without_quantizers(model.state_dict(), model)[1], quant)
    return {"parameters": sum(shapes), "bytes": folder_bytes(directory), "largest": 2 * max(shapes)}


def on_meta(sizes: dict[str, int]) -> LlamaForCausalLM:
    """The Llama of these sizes, in bfloat16, without memory."""
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes.get("kv_heads", sizes["heads"]),
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def write(directory: Path, sizes: dict[str, int], shard_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Write the float Llama with random weights, handing out each tensor as it goes."""
    model = on_meta(sizes)
    directory.mkdir()
    model.config.save_pretrained(directory)
    pool = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    sink = Sink(directory, shard_bytes)
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        size = tensor.numel()
        value = pool.roll(7919 * number).repeat(-(-size // len(pool)))[:size].reshape(tensor.shape)
        sink.add(name, value)
        yield name, value
    sink.finish()


def folder_bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def start(run: Path, out: Path, threads: int, shard_bytes: int) -> subprocess.Popen[bytes]:
    """``lightning-quant export --resume`` in a process of its own; without anything to go on from it starts at once."""
    words = ["export", run, out, "--resume", "--max-shard-bytes", shard_bytes]
    root = HERE.parents[1]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "lightning_quant.cli", *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def memory(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Resident bytes: the peak so far, and what of it now is no page of a file; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in lines)
    if "VmHWM" not in found:
        return {}
    return {key: 1024 * int(found[name].split()[0]) for key, name in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def exported(run: Path, out: Path, threads: int, shard_bytes: int) -> dict[str, float]:
    """Seconds and memory of one export that nothing interrupts."""
    begin = time.perf_counter()
    process = start(run, out, threads, shard_bytes)
    peaks = {"peak": 0, "anonymous": 0}
    while process.poll() is None:
        for key, value in memory(process).items():
            peaks[key] = max(peaks[key], value)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the export failed with status {process.returncode}")
    return {"seconds": time.perf_counter() - begin, **peaks}


def killed(run: Path, out: Path, threads: int, shard_bytes: int, whole: int, seconds: float, kills: int) -> list[int]:
    """Finished shards at each of the kills, before the export is left to end.

    A kill waits for a random number of the ``whole`` shards, of the first three quarters, and then some time more.
    """
    draw, done = random.Random(0), []
    noted = out.with_name(f".{out.name}.partial.json")

    def finished() -> int:
        return len(json.loads(noted.read_text(encoding="utf-8"))["shards"]) if noted.exists() else 0

    for wanted in sorted(draw.sample(range(whole * 3 // 4), kills)):
        process = start(run, out, threads, shard_bytes)
        while process.poll() is None and finished() < wanted:
            time.sleep(0.02)
        time.sleep(draw.random() * min(seconds / whole, 1.0))
        if process.poll() is not None:
            raise SystemExit(f"the export ended before kill {len(done) + 1}, with status {process.returncode}")
        process.send_signal(signal.SIGKILL)
        process.wait()
        done.append(finished())
        say(f"killed with {done[-1]} shards finished")
    if start(run, out, threads, shard_bytes).wait():
        raise SystemExit("the resumed export failed")
    return done


def copied(source: Path, to: Path) -> float:
    """Seconds that ``cp`` takes, until the disk has everything."""
    os.sync()
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", source, to], check=True)
    os.sync()
    seconds = time.perf_counter() - begin
    shutil.rmtree(to)
    return seconds


def identical(a: Path, b: Path) -> bool:
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    others = sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())
    return names == others and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def measure(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    run, out, again = place / "run", place / "out", place / "again"
    shard_bytes = args.shard_mib * 2**20
    made = make(run, {name: getattr(args, name) for name in SIZES}, args.scheme, 4 * GIB)
    say(f"training directory: {made['bytes'] / GIB:.2f} GiB")
    found = exported(run, out, args.threads, shard_bytes)
    say(f"export: {found['seconds']:.0f} s, {found['peak'] / GIB:.2f} GiB resident")
    copies = {"input": copied(run, place / "copy"), "output": copied(out, place / "copy")}
    say(f"cp: {copies['input']:.0f} s and {copies['output']:.0f} s")
    shards = len(list(out.glob("*.safetensors")))
    done = killed(run, again, args.threads, shard_bytes, shards, found["seconds"], args.kills)
    return {
        **made,
        "out_bytes": folder_bytes(out),
        "shards": shards,
        "export": found,
        "copies": copies,
        "killed_at": done,
        "identical": identical(out, again),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    f, s = results["figures"], results["settings"]
    export, copies, bound = f["export"], f["copies"], f["largest"] + GIB
    kills = ", ".join(map(str, f["killed_at"]))
    return "\n".join(
        [
            f"A Llama of {f['parameters'] / 1e9:.2f} billion parameters in bfloat16 ({s['layers']} layers of "
            f"{s['hidden']}), {s['scheme']}, on {results['machine']['processor']} with {s['threads']} threads and a "
            f"load of {results['machine']['load']:.1f}; `cp` of the same files in the same run:",
            "",
            "| | bytes | seconds | resident memory at its peak |",
            "|---|---|---|---|",
            f"| training directory, copied | {f['bytes'] / GIB:.2f} GiB | {copies['input']:.0f} | |",
            f"| export, copied | {f['out_bytes'] / GIB:.2f} GiB | {copies['output']:.0f} | |",
            f"| `lightning-quant export` | {f['bytes'] / GIB:.2f} to {f['out_bytes'] / GIB:.2f} GiB | "
            f"{export['seconds']:.0f} | {export['peak'] / GIB:.2f} GiB ({export['anonymous'] / GIB:.2f} not of files); "
            f"largest tensor + 1 GiB: {bound / GIB:.2f} |",
            "",
            f"Killed with SIGKILL {len(f['killed_at'])} times at random moments ({kills} of {f['shards']} shards "
            f"finished) and resumed: bytes {'identical' if f['identical'] else 'DIFFERENT'}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dir", type=Path, default=HERE.parents[1], help="on the disk to use; what is made is removed")
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shard-mib", type=int, default=256)
    parser.add_argument("--kills", type=int, default=5)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(args.threads)
    wide = args.hidden * (4 * args.hidden + 3 * args.intermediate) * args.layers + 2 * args.hidden * args.vocab
    wanted, free = (
        5.5 * wide,
        shutil.disk_usage(args.dir).free,
    )  # twice the input, twice the output, shards in the making
    if free < wanted:
        raise SystemExit(
            f"--dir {args.dir}: expected {wanted / GIB:.0f} GiB free, got {free / GIB:.0f}. Choose another."
        )
    with tempfile.TemporaryDirectory(dir=args.dir, prefix=".export-") as place:
        figures = measure(args, Path(place))
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "compressed-tensors")},
        "settings": {n: getattr(args, n) for n in (*SIZES, "scheme", "threads", "shard_mib")},
        "figures": figures,
    }
    save(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
