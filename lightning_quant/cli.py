"""The ``lightning-quant`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys

from lightning_quant.errors import CheckpointError


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0 equal or done, 1 different, 2 bad input."""
    parser = argparse.ArgumentParser(prog="lightning-quant", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("verify", help="compare an export with the training directory it came from")
    check.add_argument("export", help="directory that export() wrote")
    check.add_argument("--against", required=True, help="training directory (checkpoint-* or output directory)")
    check.add_argument("--tolerance", type=float, help="largest logit difference that counts as equal (default: 0)")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(run=_verify)

    write = commands.add_parser("export", help="write a training directory as a low-bit checkpoint")
    write.add_argument("training", help="training directory (checkpoint-* or output directory)")
    write.add_argument("out", help="directory that does not exist yet")
    write.add_argument("--format", default=None, help="compressed-tensors (default) or folded")
    write.set_defaults(run=_export)

    table = commands.add_parser("methods", help="list methods, observers, ranges and grids, or explain a method")
    table.add_argument("name", nargs="?", help="print this method's formula and defaults and plot its gradient")
    table.add_argument("--plot", metavar="PNG", help="where the plot goes (default: NAME.png here)")
    table.add_argument("--no-plot", action="store_true", help="text only")
    table.set_defaults(run=_methods)

    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, ValueError, FileExistsError, ImportError) as error:
        print(f"lightning-quant {arguments.command}: {error}", file=sys.stderr)
        return 2
    return status


def _verify(arguments: argparse.Namespace) -> int:
    from lightning_quant.export import verify

    report = verify(arguments.export, arguments.against, tolerance=arguments.tolerance)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0 if report.ok else 1


def _export(arguments: argparse.Namespace) -> int:
    from lightning_quant.checkpoint import load_quant_config, load_training_checkpoint
    from lightning_quant.export import export

    tokenizer = None
    model = load_training_checkpoint(arguments.training)
    if hasattr(model, "config"):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(arguments.training)
        except (OSError, ValueError):
            print(f"{arguments.training}: no tokenizer there, none written", file=sys.stderr)
    config = load_quant_config(arguments.training)
    print(export(model, arguments.out, format=arguments.format, tokenizer=tokenizer, config=config))
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from lightning_quant import catalog

    if arguments.name is not None:
        print(catalog.describe(arguments.name))
        if not arguments.no_plot:
            from lightning_quant import plots

            print(f"plot: {plots.draw(arguments.name, arguments.plot or f'{arguments.name}.png')}")
        return 0
    if arguments.plot is not None:
        raise ValueError("lightning-quant methods --plot: expected a method's name with it, got none. Add the name.")
    print(catalog.table())
    for title, lines in catalog.parts().items():
        print(f"\n{title}")
        for name, line in lines.items():
            print(f"  {name:<14} {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
