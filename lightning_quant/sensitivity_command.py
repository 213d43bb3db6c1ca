"""``lightning-quant sensitivity``: what each layer costs at each width, and a recipe within a budget."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.spec import QuantConfig

if TYPE_CHECKING:
    from lightning_quant.sensitivity import Sensitivity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="directory of a float causal language model, with its tokenizer")
    parser.add_argument("--schemes", default="w2a16-g32,w3a16-g32,w4a16-g32,w8a16-g32", help="tried on every layer")
    parser.add_argument("--metric", default="kl", help="kl (default), mse or loss")
    parser.add_argument("--data", metavar="TEXT", help="text file (default: Python's help topics)")
    parser.add_argument("--samples", type=int, default=8, help="rows of tokens (default: 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens in each (default: 128)")
    parser.add_argument("--target", default="vllm", help="runtime, whose fused layers get one width (default: vllm)")
    parser.add_argument("--bits", type=float, help="stored bits per weight, scales included, that the recipe may take")
    parser.add_argument("--method", default="pege", help="method that the recipe names (default: pege)")
    parser.add_argument("--out", metavar="YAML", help="where the recipe goes, a QuantConfig; needs --bits")
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--plot", metavar="PNG", help="where a plot of them goes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_quant.rounding.data import read_text, rows
    from lightning_quant.sensitivity import sensitivity

    if arguments.out and arguments.bits is None:
        raise ValueError(explain("sensitivity --out", "--bits as well", "none", "Add for example --bits 4.5."))
    schemes = tuple(arguments.schemes.split(","))
    config = QuantConfig(arguments.method, target=arguments.target)
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        cure = "Name a directory that save_pretrained wrote, tokenizer included."
        got = " ".join(str(error).split())[:300]
        raise CheckpointError(explain(str(arguments.model), "a causal language model", got, cure)) from error
    vocabulary = int(model.config.get_text_config().vocab_size)
    batches = rows(read_text(arguments.data), tokenizer, vocabulary, arguments.samples, arguments.length)
    if arguments.metric == "loss":
        batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    found = sensitivity(model, batches, schemes, arguments.metric, config)
    print(found)
    if arguments.json:
        file = Path(arguments.json)
        temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
        temporary.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
    if arguments.plot:
        _plot(found, arguments.plot)
    if arguments.bits is not None:
        rules = found.recipe(arguments.bits)
        for rule in rules:
            print(f"{rule.match}: {found.schemes[found.choice(rule)]}")
        print(f"{found.stored(rules):.3f} bits per weight")
        if arguments.out:
            QuantConfig.parse(arguments.method, schemes[0], rules=rules, target=arguments.target).to_yaml(arguments.out)
    return 0


def _plot(found: Sensitivity, path: str) -> None:
    from lightning_quant.plots import figure_of, save

    figure, ((axes,),) = figure_of(1, 1, 7.0, 4.0)
    for scheme, column in zip(found.schemes, zip(*found.losses, strict=True), strict=True):
        axes.plot(range(len(column)), [max(x, 1e-12) for x in column], marker=".", label=scheme)
    axes.set_yscale("log")
    axes.set_xlabel("layer, in order")
    axes.set_ylabel(f"{found.metric} above the float model's")
    axes.legend()
    save(figure, path)
