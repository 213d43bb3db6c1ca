"""What rounding a weight costs on a GPU, forward and backward: PyTorch's own kernels, its compiler's, and Triton's.

A figure is the median time of one call, caches emptied before each, and its multiple of the time that copying the
weight takes (backward: adding two of its size into a third), below which nothing that reads and writes each number
once can be.  Outputs are compared as well.

    python examples/benchmarks/gpu_kernels.py             # some minutes; needs a CUDA device and Triton
    python examples/benchmarks/gpu_kernels.py --table     # the table of the last results
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine, save
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.estimators import kernels
from lightning_quant.estimators.base import gradients, quantized
from lightning_quant.estimators.compiled import one_pass

RESULTS = Path(__file__).resolve().parent / "results" / "gpu_kernels.json"
SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096), (128256, 2048))
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ste", "w4a16-g128", {}),
    ("lsq", "w4a16-g128", {}),
    ("lsq", "w4a16-g32-asym", {}),
    ("lsq", "w8a16-channel", {}),
    ("ewgs", "w4a16-g128", {}),
    ("pege", "w4a16-g128", {"theta": "group", "initial": 0.5}),
    ("pege", "w4a16-g128", {"theta": "element", "initial": 0.5}),
)
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "plain": (quantized, gradients),
    "compiler": (partial(one_pass, quantized), partial(one_pass, gradients)),
    "triton": (kernels.quantized, kernels.gradients),
}
Calls = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]


def calls(
    method: str, scheme: str, options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, device: str
) -> Calls:
    """Forward and backward of a random weight's quantizer, in each way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device=device))
    weight = model[0].weight.detach()
    attach(model, QuantConfig.parse(method, scheme, **options))
    quantizer: Any = model[0].weight_quant
    way, (scale, zero, *rest) = quantizer.deferred(weight)
    x, g = weight.reshape(way.shape), torch.randn_like(weight).reshape(way.shape)
    given = [
        t.detach() if isinstance(t, torch.Tensor) else t for t in (scale, way.zero if zero is None else zero, *rest)
    ]
    assert kernels.covers(way.settings, x, *given)
    learns = scale.requires_grad
    return {
        name: (partial(forward, way.settings, x, *given), partial(backward, way.settings, learns, g, x, *given))
        for name, (forward, backward) in WAYS.items()
    }


def differences(given: Calls) -> dict[str, float]:
    """Share of outputs that are not plain ones, and the largest difference of the input's gradient, relative."""
    (y, want), (z, got) = ([f() for f in given[name]] for name in ("plain", "triton"))
    wide = want.x.double()
    return {
        "outputs": float((y != z).double().mean()),
        "gradients": float((got.x.double() - wide).abs().max() / wide.abs().max()),
    }


def measured(given: Calls, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds of each way, and of moving as much memory."""
    from triton.testing import do_bench

    a, b, out = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(3))
    floor = [partial(out.copy_, a), partial(torch.add, a, b, out=out)]
    times = {
        name: [do_bench(f, return_mode="median") for f in pair] for name, pair in {**given, "floor": floor}.items()
    }
    return {"milliseconds": {name: [round(t, 5) for t in pair] for name, pair in times.items()}, **differences(given)}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{results['gpu']}, {results['dtype']}, torch {results['versions']['torch']}, Triton "
        f"{results['versions']['triton']}: time over that of moving the same memory, forward and backward.",
        "",
        f"| weight | method | scheme | {' | '.join(WAYS)} | outputs that differ |",
        f"|---|---|---|{'---|' * len(WAYS)}---|",
    ]
    for row in results["rows"]:
        times = row["milliseconds"]
        cells = [
            " x ".join(map(str, row["shape"])),
            f"{row['method']} {row['options'].get('theta', '')}",
            row["scheme"],
        ]
        cells += [", ".join(f"{t / f:.2f}" for t, f in zip(times[w], times["floor"], strict=True)) for w in WAYS]
        lines.append(f"| {' | '.join([*cells, format(row['outputs'], '.2g')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of --out and end")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text(encoding="utf-8"))))
        return
    if not torch.cuda.is_available() or not kernels.is_installed():
        sys.exit("gpu_kernels.py times kernels on a GPU: it needs a CUDA device and Triton.")
    dtype, rows = getattr(torch, args.dtype), []
    for shape in SHAPES:
        for method, scheme, options in CASES:
            given = calls(method, scheme, options, shape, dtype, "cuda")
            rows.append({"shape": shape, "method": method, "scheme": scheme, "options": options})
            rows[-1] |= measured(given, shape, dtype)
            print(rows[-1], file=sys.stderr, flush=True)
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "dtype": args.dtype,
        "rows": rows,
    }
    save(args.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
