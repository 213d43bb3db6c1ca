"""``lightning-quant roofline``: memory, operations, bytes and time of every layer before there is a weight."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from lightning_quant.errors import explain, unknown
from lightning_quant.spec import QuantConfig

YAML = (".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    what = "config.json of transformers, or a directory with one: a model, a training directory or an export"
    parser.add_argument("config", help=what)
    parser.add_argument("--hardware", required=True, help="a100, h100, h200, a6000, cpu (measured), or a YAML file")
    parser.add_argument(
        "--scheme", help="e.g. w4a16-g128, w16, or a QuantConfig's YAML file (default: the directory's)"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time (default: 1)")
    parser.add_argument("--prompt", type=int, help="tokens that are read at once (default: 512)")
    parser.add_argument("--context", type=int, help="tokens before the one that is written (default: the prompt's)")
    parser.add_argument("--kv", type=int, choices=(16, 8), help="bits of keys and values (default: the scheme's)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the rest (default: the config's)"
    )
    parser.add_argument("--json", metavar="FILE", help="where the figures go, layer by layer")
    parser.add_argument("--plot", metavar="PNG", help="where a plot goes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Predict, print, and write what was asked for."""
    from lightning_quant.roofline.hardware import HARDWARE, load_hardware
    from lightning_quant.roofline.phases import load_for, open_model
    from lightning_quant.roofline.predict import roofline
    from lightning_quant.roofline.table import draw

    name, hardware = arguments.hardware, HARDWARE.get(arguments.hardware)
    if hardware is None and name.endswith(YAML):
        hardware = load_hardware(name)
    elif hardware is None and name != "cpu":
        raise ValueError(unknown("hardware", name, [*HARDWARE, "cpu", "FILE.yaml"], "roofline --hardware"))
    scheme, config = _scheme(arguments.scheme, Path(arguments.config))
    model = open_model(arguments.config, arguments.dtype)
    load = load_for(model, arguments.batch, arguments.prompt, arguments.context)
    if hardware is None:
        from lightning_quant.roofline.machine import measure

        hardware = measure()
    found = roofline(model, config, hardware, load, arguments.kv, scheme)
    print(found)
    if arguments.json:
        file = Path(arguments.json)
        temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
        temporary.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
    if arguments.plot:
        print(f"plot: {draw(found, arguments.plot)}")
    return 0


def _scheme(given: str | None, path: Path) -> tuple[str, QuantConfig | None]:
    """The scheme's name and config; the directory's own where none is given."""
    if given is None:
        own = path / "quant_config.json"
        if not own.is_file():
            cure = "Add for example --scheme w4a16-g128, or w16 for the float model."
            raise ValueError(explain("roofline --scheme", f"a scheme, or {own.name} in the directory", "none", cure))
        from lightning_quant.checkpoint import load_quant_config

        return own.name, load_quant_config(path)
    if given.endswith(YAML):
        return given, QuantConfig.from_yaml(given)
    config = QuantConfig.parse("ste", given)
    return given, None if config.weight is None else config
