"""The ``lightning-quant`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from lightning_quant.errors import CheckpointError, explain
from lightning_quant.ptq.command import add_arguments as ptq_arguments
from lightning_quant.report_page.command import add_arguments as report_arguments
from lightning_quant.roofline_command import add_arguments as roofline_arguments
from lightning_quant.sensitivity.command import add_arguments as sensitivity_arguments


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0 equal or done, 1 different, 2 bad input."""
    parser = argparse.ArgumentParser(prog="lightning-quant", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    check = commands.add_parser("verify", help="compare an export with the training directory it came from")
    check.add_argument("export", help="directory that export() wrote")
    check.add_argument("--against", required=True, help="training directory (checkpoint-* or output directory)")
    check.add_argument("--tolerance", type=float, help="largest logit difference that counts as equal (default: 0)")
    check.add_argument(
        "--no-logits", action="store_true", help="compare what is stored only, one tensor in memory at a time"
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(run=_verify)

    write = commands.add_parser("export", help="write a training directory as a low-bit checkpoint")
    write.add_argument("training", help="training directory (checkpoint-* or output directory)")
    write.add_argument("out", help="directory that does not exist yet")
    write.add_argument(
        "--format", default=None, help="compressed-tensors, gguf, gptq, onnx, torchao or folded (default: the target's)"
    )
    write.add_argument("--target", default=None, help="runtime it is for (default: the one training followed)")
    write.add_argument("--max-shard-bytes", type=int, default=2**30, help="largest file of weights (default: 1 GiB)")
    write.add_argument("--resume", action="store_true", help="go on from the shards that an interrupted run finished")
    write.add_argument("--overwrite", action="store_true", help="replace an export once the new one is complete")
    write.set_defaults(run=_export)

    bears = commands.add_parser("sensitivity", help="find the layers that bear few bits, and a recipe within a budget")
    sensitivity_arguments(bears)

    shows = commands.add_parser("report", help="write an HTML page about a run or an export: which layer hurts most")
    report_arguments(shows)

    limits = commands.add_parser("roofline", help="predict memory and time of every layer from a config.json")
    roofline_arguments(limits)

    quick = commands.add_parser("ptq", help="round a float model without training, and export it")
    ptq_arguments(quick)

    speak = commands.add_parser("generate", help="continue a prompt with an export, on the low-bit kernels")
    speak.add_argument("export", help="directory in the compressed-tensors format, with a tokenizer")
    speak.add_argument("--prompt", required=True)
    speak.add_argument("--max-new-tokens", type=int, default=64)
    speak.set_defaults(run=_generate)

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
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        print(f"lightning-quant {arguments.command}: {error}", file=sys.stderr)
        return 2
    return status


def _verify(arguments: argparse.Namespace) -> int:
    from lightning_quant.export import verify

    report = verify(arguments.export, arguments.against, tolerance=arguments.tolerance, logits=not arguments.no_logits)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0 if report.ok else 1


def _export(arguments: argparse.Namespace) -> int:
    from lightning_quant.export import export

    keywords = {
        name: getattr(arguments, name) for name in ("format", "target", "max_shard_bytes", "resume", "overwrite")
    }
    print(export(arguments.training, arguments.out, tokenizer=_tokenizer(arguments.training), **keywords))
    return 0


def _tokenizer(directory: str) -> Any:
    """The tokenizer beside the weights; None without one, and where there is nothing to load it with."""
    if not os.path.isdir(directory):
        return None
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, ImportError):
        print(f"{directory}: no tokenizer there, none written", file=sys.stderr)
        return None


def _generate(arguments: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from lightning_quant import runtime

    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.export)
    except OSError as error:
        cure = "Export with tokenizer=..., or save one there."
        raise ValueError(explain(arguments.export, "a tokenizer beside the weights", "none", cure)) from error
    model: Any = runtime.load(arguments.export)
    print(model.runtime_report, file=sys.stderr)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
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
