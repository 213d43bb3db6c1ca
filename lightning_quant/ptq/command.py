"""``lightning-quant ptq``: low bits without training."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from lightning_quant.errors import explain
from lightning_quant.rounding.methods import ROUNDINGS
from lightning_quant.spec import QuantConfig, YamlLoader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", help="directory of a float model: config.json, safetensors, a tokenizer")
    parser.add_argument("out", help="directory of the export, which does not exist yet")
    parser.add_argument("--scheme", default=None, help="bits and granularity (default: w4a16-g128)")
    parser.add_argument("--config", metavar="YAML", help="what to quantize and how, in place of --scheme")
    parser.add_argument("--rounding", default="gptq", help=f"one of {', '.join(ROUNDINGS)} (default: gptq)")
    parser.add_argument(
        "--rounding-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="such as damping=0.1",
    )
    parser.add_argument("--data", metavar="TEXT", help="text file to calibrate with (default: Python's help topics)")
    parser.add_argument("--samples", type=int, default=128, help="rows of tokens (default: 128)")
    parser.add_argument("--length", type=int, default=512, help="tokens in each (default: 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounded", metavar="DIR", help="keep the rounded model there, to verify against or train on")
    parser.add_argument("--format", default=None, help="of the export (default: the target's)")
    parser.add_argument("--target", default=None, help="runtime it is for")
    parser.add_argument("--max-shard-bytes", type=int, default=2**30, help="largest file of weights (default: 1 GiB)")
    parser.add_argument("--resume", action="store_true", help="go on after the blocks that an interrupted run finished")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Round, export, and print what was done."""
    from lightning_quant.ptq.directory import ptq

    names = ("data", "samples", "length", "seed", "rounded", "resume", "format", "target", "max_shard_bytes")
    keywords = {name: getattr(arguments, name) for name in names}
    options = dict(_option(text) for text in arguments.rounding_option)
    report, written = ptq(arguments.model, arguments.out, _config(arguments), arguments.rounding, **keywords, **options)
    print(report)
    print(written)
    return 0


def _config(arguments: argparse.Namespace) -> QuantConfig:
    if arguments.config is None:
        target = {} if arguments.target is None else {"target": arguments.target}
        return QuantConfig.parse("ste", arguments.scheme or "w4a16-g128", **target)
    if arguments.scheme is not None:
        raise ValueError(explain("ptq", "--scheme or --config", "both", "Leave one out."))
    return QuantConfig.from_yaml(arguments.config)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(explain("--rounding-option", "NAME=VALUE", repr(text), "Such as damping=0.1."))
    return name, yaml.load(value, YamlLoader)
