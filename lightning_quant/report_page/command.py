"""``lightning-quant report``: one page about a run or an export."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_quant.errors import explain

if TYPE_CHECKING:
    from torch import nn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    what = "training directory, log directory of Lightning, export, or several of one run"
    parser.add_argument("directories", nargs="+", metavar="DIR", help=what)
    parser.add_argument("--out", default="report.html", metavar="HTML", help="where the page goes (default: here)")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a run (directory, or JSON of figures) whose evaluation goes beside this one's; may be repeated",
    )
    parser.add_argument("--sensitivity", metavar="FILE", help="what lightning-quant sensitivity --json wrote")
    parser.add_argument(
        "--module",
        metavar="PACKAGE.MODULE:CLASS",
        help="your LightningModule, which the newest checkpoint in DIR is loaded into, so that its layers are measured",
    )
    parser.add_argument("--logits", action="store_true", help="verify also runs both models, which needs their memory")
    parser.add_argument("--no-plot", action="store_true", help="tables only, without matplotlib")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page, and say where it is."""
    from lightning_quant.report_page.write import write_page

    model = None if arguments.module is None else _module(arguments.module, arguments.directories)
    written = write_page(
        arguments.directories,
        arguments.out,
        model=model,
        compare=[_named(word) for word in arguments.compare],
        sensitivity=arguments.sensitivity,
        logits=arguments.logits,
        plots=not arguments.no_plot,
    )
    print(written)
    return 0


def _named(word: str) -> tuple[str, str]:
    name, _, path = ("", "", word) if Path(word).exists() else word.rpartition("=")
    return name or Path(path).resolve().name, path


def _module(name: str, directories: list[str]) -> nn.Module:
    """The LightningModule of a class that the user names, from the newest checkpoint."""
    from lightning_quant.callback import QuantCallback
    from lightning_quant.report_page.find import find_sources

    checkpoint = find_sources([Path(d) for d in directories]).checkpoint
    if checkpoint is None:
        cure = "Name the directory that ModelCheckpoint wrote into, or leave --module out."
        raise ValueError(explain("report --module", "a *.ckpt in DIR", "none", cure))
    file, _, kind = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(file), kind)
    except (ImportError, AttributeError, ValueError) as error:
        cure = "Write it as package.module:Class, as Python would import it from here."
        raise ValueError(explain(f"report --module {name}", "a class", str(error), cure)) from error
    finally:
        sys.path.remove(os.getcwd())
    module: nn.Module = QuantCallback.load_from_checkpoint(found, checkpoint, map_location="cpu")
    return module
