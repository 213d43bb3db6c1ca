"""``hf-quant SCRIPT ...``: run an unmodified script that builds a ``transformers.Trainer``, quantized.

Our flags are taken off the command line, the script sees its own.  Also ``python -m hf_integration`` and,
on many GPUs, ``accelerate launch -m hf_integration`` or ``torchrun -m hf_integration``.
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_integration.arguments import QuantArguments
from hf_integration.command import Command, ScriptError, parser, split_argv, without_ours
from lightning_quant.errors import AttachError, CheckpointError, CoverageError, explain


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status: 2 with one line on stderr where a flag or the script is at fault."""
    arguments = sys.argv[1:] if argv is None else argv
    if importlib.util.find_spec("transformers") is None:
        cure = "pip install 'lightning-quant[hf,export]'"
        return _refuse(ImportError(explain("this environment", "transformers", "none", cure)))
    if not arguments or arguments[0] in ("-h", "--help"):
        parser().print_help()
        return 0 if arguments else 2
    try:
        command = split_argv(arguments)
        quant = command.quant
        if quant.to_config() is None and quant.quant_export is not None:
            print("hf-quant: --quant none trains in float, so nothing will be exported", file=sys.stderr)
        elif quant.quant_export is not None:
            from hf_integration.trainer import check_free

            check_free(quant.quant_export)
    except (ValueError, OSError) as error:
        return _refuse(error)
    try:
        run_script(command)
    except (AttachError, CheckpointError, CoverageError, ScriptError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"hf-quant: {error}", file=sys.stderr)
    return 2


def run_script(command: Command) -> dict[str, Any]:
    """Run a script as ``__main__`` with every Trainer it builds quantized; returns its globals.

    ``--quant none`` runs it as it is.

    Raises:
        ScriptError: The script has flags of our names or quantizes by itself; or it ended without building a
            Trainer, or without training where an export was asked for.
    """
    script, quant = str(command.script), command.quant
    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [script, *command.argv]
    sys.path.insert(0, str(command.script.resolve().parent))
    built: list[Any] = []
    result: dict[str, Any] = {}
    try:
        with without_ours(command.taken):
            if quant.to_config() is None:
                return runpy.run_path(script, run_name="__main__")
            with quantized_trainers(quant, built):
                result = runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0) or {"-h", "--help"} & set(command.argv):
            raise
    finally:
        sys.argv, sys.path[:] = saved_argv, saved_path
    if not built:
        raise ScriptError(
            explain(
                script,
                "a script that builds a transformers.Trainer",
                "none built",
                "In a hand-written loop use lightning_quant.attach and QuantController.",
            )
        )
    if quant.quant_export is not None and not any(t.quant_exported for t in built):
        raise ScriptError(
            explain(
                script,
                f"a call of Trainer.train() before the export to {quant.quant_export}",
                "none that ended",
                "Let the script train (often --do_train), or drop --quant_export.",
            )
        )
    return result


@contextmanager
def quantized_trainers(quant: QuantArguments, built: list[Any] | None = None) -> Iterator[None]:
    """Within this context every ``Trainer``, and every subclass a script defines, trains quantized.

    The instance gets a class made of ``QuantTrainerMixin`` and its own, and its model quantizers, at the
    moment ``Trainer.__init__`` runs: before anything is wrapped and before the optimizer exists.

    Args:
        quant: Our flags.
        built: Collects the trainers.
    """
    from transformers import Trainer

    from hf_integration.trainer import QuantTrainerMixin

    original = Trainer.__init__

    @functools.wraps(original)
    def init(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(self, QuantTrainerMixin):
            cure = "Run it with python, without hf-quant."
            raise ScriptError(explain("the script", "trainers in float", type(self).__name__, cure))
        cls = type(self)
        self.__class__ = type(f"Quant{cls.__name__}", (QuantTrainerMixin, cls), {"__module__": cls.__module__})
        self.init_quant(quant)
        original(self, model, *args, **kwargs)
        self.finish_init_quant()
        if built is not None:
            built.append(self)

    Trainer.__init__ = init
    try:
        yield
    finally:
        Trainer.__init__ = original


if __name__ == "__main__":
    sys.exit(main())
