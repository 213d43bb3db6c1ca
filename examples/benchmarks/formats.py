"""Which format holds which scheme of which architecture, and what its reader computes beside the trained model.

``python examples/benchmarks/formats.py`` writes results/formats.json; the tests run the same function and compare.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from architectures import FAMILIES, Family
from machine import machine, save
from torch import nn

from lightning_quant import QuantConfig, attach, calibrate
from lightning_quant.export import export, verify

RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic", "num_labels": 4}
MOBILENET = {
    "depth_multiplier": 0.35,
    "min_depth": 8,
    "depth_divisible_by": 8,
    "image_size": 16,
    "num_labels": 4,
    "initializer_range": 0.3,
}
SCALAR = {**FAMILIES["gemma2"].sizes, "query_pre_attn_scalar": 16}  # of its head size, as Gemma 2 2B and 9B have it
MODELS = {name: FAMILIES[name] for name in ("llama", "qwen2", "qwen3")} | {
    "gemma2": replace(FAMILIES["gemma2"], sizes=SCALAR),
    "opt": FAMILIES["opt"],
    "bert": FAMILIES["bert"],
    "resnet": Family("ResNet", hf.ResNetForImageClassification, hf.ResNetConfig, RESNET, "images"),
    "mobilenet": Family("MobileNetV2", hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config, MOBILENET, "images"),
}
ROWS: dict[str, tuple[str, str, str]] = {  # name -> format, scheme, target
    "compressed-tensors w4a16-g32": ("compressed-tensors", "w4a16-g32", "vllm"),
    "compressed-tensors w4a16-g32-asym": ("compressed-tensors", "w4a16-g32-asym", "vllm"),
    "compressed-tensors w2a16-g32": ("compressed-tensors", "w2a16-g32", "vllm"),
    "compressed-tensors w8a16": ("compressed-tensors", "w8a16", "vllm"),
    "compressed-tensors w8a8": ("compressed-tensors", "w8a8", "transformers"),
    "compressed-tensors w8a8-static": ("compressed-tensors", "w8a8-static", "vllm"),
    "compressed-tensors w4a8-g32": ("compressed-tensors", "w4a8-g32", "transformers"),
    "compressed-tensors w8a16-kv8": ("compressed-tensors", "w8a16-kv8", "transformers"),
    "compressed-tensors fp8": ("compressed-tensors", "fp8", "vllm"),
    "compressed-tensors nvfp4a16": ("compressed-tensors", "nvfp4a16", "vllm"),
    "compressed-tensors mxfp4a16": ("compressed-tensors", "mxfp4a16", "vllm"),
    "gguf Q8_0": ("gguf", "w8a16", "llama.cpp"),
    "gguf Q4_0": ("gguf", "w4a16", "llama.cpp"),
    "gguf Q4_1": ("gguf", "w4a16-asym", "llama.cpp"),
    "onnx w8a16": ("onnx", "w8a16", "onnxruntime"),
    "onnx w4a16-g32": ("onnx", "w4a16-g32", "onnxruntime"),
    "onnx w8a8-static": ("onnx", "w8a8-static", "onnxruntime"),
    "gptq w4a16-g32": ("gptq", "w4a16-g32", "gptq"),
    "folded w4a16-g32": ("folded", "w4a16-g32", "vllm"),
}


@cache
def trained(name: str, scheme: str, target: str) -> tuple[nn.Module, QuantConfig]:
    """A model with calibrated quantizers; its weights are random, which is harder for a reader than trained ones."""
    scheme = scheme.replace("-g32", "") if MODELS[name].kind == "images" else scheme  # convolutions: per channel
    config = QuantConfig.parse("ste", scheme, target=target)
    model = MODELS[name].build()
    attach(model.eval(), config)
    calibrate(model, [MODELS[name].inputs(seed=seed) for seed in range(3)])
    return model, config


def cell(name: str, row: str) -> dict[str, Any]:
    """One verdict: ``exact``, ``bound`` with the largest difference, or ``refused`` with the reason."""
    format, scheme, target = ROWS[row]
    try:
        model, config = trained(name, scheme, target)
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            export(model, Path(directory) / "out", format=format, config=config, inputs=MODELS[name].inputs())
            report = verify(Path(directory) / "out", model, MODELS[name].inputs())
    except ValueError as error:
        return {"verdict": "refused", "why": " ".join(str(error).split())}
    kind = "different" if not report.ok else "exact" if report.max_abs_diff == 0 else "bound"
    return {"verdict": kind, "max_abs_diff": report.max_abs_diff, "tolerance": report.tolerance}


def table(data: dict[str, Any]) -> str:
    """The README's table, with the reasons of refusals below it."""
    reasons: dict[str, int] = {}
    titles = [family.title for family in MODELS.values()]
    lines = ["| format and scheme | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for row in ROWS:
        cells = []
        for name in MODELS:
            found = data["cells"][row][name]
            if found["verdict"] == "refused":
                number = reasons.setdefault(reason(found["why"]), len(reasons) + 1)
                cells.append(f"- [{number}]")
            else:
                cells.append("exact" if found["verdict"] == "exact" else f"{found['max_abs_diff']:.0e}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    notes = [f"[{number}] {why}" for why, number in reasons.items()]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip()


def reason(why: str) -> str:
    """A refusal without the layer it names, and without its sizes."""
    return re.sub(r"=\d+", "=n", why.partition(": ")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    names = parser.parse_args().models
    warnings.simplefilter("ignore")
    cells: dict[str, dict[str, Any]] = {row: {} for row in ROWS}
    for name in names:
        for row in ROWS:
            cells[row][name] = cell(name, row)
            print(name, row, cells[row][name], file=sys.stderr, flush=True)
        trained.cache_clear()
    if names == list(MODELS):
        data = {"machine": machine(), "torch": torch.__version__, "cells": cells}
        file = Path(__file__).resolve().parent / "results" / "formats.json"
        save(file, data)


if __name__ == "__main__":
    main()
