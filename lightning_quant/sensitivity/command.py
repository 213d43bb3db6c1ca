"""``lightning-quant sensitivity``: what each layer loses under each scheme, and a recipe within a budget."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.rounding.data import read_text, rows
from lightning_quant.spec import QuantConfig

SAMPLES = {True: 8, False: 256}  # rows of text, of tensors
AT_ONCE = 32  # rows of tensors in a batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="directory of a float model of transformers; with its tokenizer if it reads text")
    parser.add_argument("--schemes", default="w2a16-g32,w3a16-g32,w4a16-g32,w8a16-g32", help="tried on every layer")
    parser.add_argument(
        "--measure",
        default="kl",
        help="kl (default), mse or loss of the output with one layer quantized at a time; sqnr of the layer's own "
        "output; hessian: its trace times the squared error of the weight",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="text (default: Python's help topics), or .safetensors with a tensor for each argument of the forward, "
        "such as pixel_values and labels, a row per sample",
    )
    parser.add_argument("--samples", type=int, help="rows that are used (default: 8 of text, 256 of tensors)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row of text (default: 128)")
    parser.add_argument("--probes", type=int, default=4, help="random vectors per batch and layer, for hessian")
    parser.add_argument("--method", help="method that the recipe names (default: pege)")
    parser.add_argument("--target", help="runtime, whose fused layers get one width (default: vllm)")
    parser.add_argument(
        "--config", metavar="YAML", help="rules, operators and so on, in place of --method and --target"
    )
    parser.add_argument(
        "--budget",
        help="what the recipe may take, such as 4.5bits (stored per weight, scales included), 120MiB (the whole "
        "model), 12GBOPs (bit operations per sample) or 3ms (with --latency)",
    )
    parser.add_argument("--solver", default="exact", help="exact (integer programming, default) or greedy")
    parser.add_argument(
        "--latency", metavar="FILE|measure", help="JSON {layer or pattern: {scheme: seconds}}, or time the kernels here"
    )
    parser.add_argument(
        "--rows", type=int, help="rows of inputs to time layers with, 1 as in decoding (default: a batch)"
    )
    parser.add_argument("--out", metavar="YAML", help="where the recipe goes, a QuantConfig; needs --budget")
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--plot", metavar="PNG", help="where a plot of them, and of the chosen widths, goes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    from lightning_quant.sensitivity import Budget, read_seconds, sensitivity

    if arguments.out and arguments.budget is None:
        cure = "Add for example --budget 4.5bits."
        raise ValueError(explain("sensitivity --out", "--budget as well", "none", cure))
    budget = None if arguments.budget is None else Budget.parse(arguments.budget)
    if budget is not None and budget.kind == "seconds" and arguments.latency is None:
        cure = "Add --latency FILE, or --latency measure."
        raise ValueError(explain(f"--budget {arguments.budget}", "--latency as well", "none", cure))
    config, schemes = _config(arguments), tuple(arguments.schemes.split(","))
    latency = arguments.latency
    if latency is not None and latency != "measure":
        latency = read_seconds(latency)
    model, batches = _load(arguments)
    settings = {"latency": latency, "rows": arguments.rows, "probes": arguments.probes}
    found = sensitivity(model, batches, schemes, arguments.measure, config, **settings)
    print(found)
    if arguments.json:
        _write(arguments.json, json.dumps(found.to_dict(), indent=1) + "\n")
    recipe = None if budget is None else found.recipe(budget, arguments.solver)
    if recipe is not None:
        print(f"\n{recipe}")
        if arguments.out:
            recipe.config(config).to_yaml(arguments.out)
    if arguments.plot:
        from lightning_quant.sensitivity.plot import draw

        draw(found, arguments.plot, recipe)
    return 0


def _config(arguments: argparse.Namespace) -> QuantConfig:
    if arguments.config is None:
        return QuantConfig(arguments.method or "pege", target=arguments.target or "vllm")
    if arguments.method is not None or arguments.target is not None:
        raise ValueError(explain("sensitivity", "--config, or --method and --target", "both", "Leave one out."))
    return QuantConfig.from_yaml(arguments.config)


def _load(arguments: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """The model, of the class that its config names, and batches for it."""
    import transformers

    path, of_text = arguments.model, not str(arguments.data or "").endswith(".safetensors")
    samples = SAMPLES[of_text] if arguments.samples is None else arguments.samples
    try:
        settings = transformers.AutoConfig.from_pretrained(path)
        kind: Any = getattr(transformers, (settings.architectures or [""])[0], transformers.AutoModelForCausalLM)
        model = kind.from_pretrained(path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path) if of_text else None
    except (OSError, ValueError) as error:
        cure = "Name a directory that save_pretrained wrote, with a tokenizer if the model reads text."
        got = " ".join(str(error).split())[:300]
        raise CheckpointError(explain(str(path), "a model of transformers", got, cure)) from error
    if not of_text:
        return model, tensors(arguments.data, samples)
    vocabulary = int(model.config.get_text_config().vocab_size)
    batches = rows(read_text(arguments.data), tokenizer, vocabulary, samples, arguments.length)
    return model, [{**batch, "labels": batch["input_ids"]} for batch in batches]


def tensors(path: str | Path, samples: int) -> list[dict[str, Any]]:
    """Batches of the first rows of the tensors in a file.

    Args:
        path: safetensors, one tensor for each argument of the forward.
        samples: How many rows.

    Raises:
        ValueError: No file of that form, no rows, or tensors of different lengths.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path)
    except SafetensorError as error:
        raise ValueError(explain(str(path), "a safetensors file", str(error), "Write it with save_file.")) from error
    lengths = {len(t) if t.ndim else 0 for t in held.values()}
    if len(lengths) != 1 or min(lengths) < 1 or samples < 1:
        got = f"{ {name: tuple(t.shape) for name, t in held.items()} }, of which {samples} rows are wanted"
        raise ValueError(explain(str(path), "tensors with as many rows as there are samples", got, "Write it anew."))
    first = min(samples, *lengths)
    return [{n: t[i : min(i + AT_ONCE, first)] for n, t in held.items()} for i in range(0, first, AT_ONCE)]


def _write(path: str, text: str) -> None:
    file = Path(path)
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
