"""``hf-quant SCRIPT ...``: run an unmodified script that builds a ``transformers.Trainer``, quantized.

Our flags are taken off the command line, the script sees its own.  Also ``python -m hf_integration`` and,
on many GPUs, ``accelerate launch -m hf_integration`` or ``torchrun -m hf_integration``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import runpy
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_integration.arguments import QuantArguments
from lightning_quant.errors import AttachError, CheckpointError, CoverageError, explain, unknown
from lightning_quant.estimators import ESTIMATORS


class ScriptError(RuntimeError):
    """The script did not do what the flags need it to."""


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status: 2 with one line on stderr where a flag or the script is at fault."""
    arguments = sys.argv[1:] if argv is None else argv
    if importlib.util.find_spec("transformers") is None:
        cure = "pip install 'lightning-quant[hf,export]'"
        return _refuse(ImportError(explain("this environment", "transformers", "none", cure)))
    if not arguments or arguments[0] in ("-h", "--help"):
        _parser().print_help()
        return 0 if arguments else 2
    try:
        script, quant, rest = split_argv(arguments)
        if quant.to_config() is None and quant.quant_export is not None:
            print("hf-quant: --quant none trains in float, so nothing will be exported", file=sys.stderr)
        elif quant.quant_export is not None:
            from hf_integration.trainer import check_free

            check_free(quant.quant_export)
    except (ValueError, OSError) as error:
        return _refuse(error)
    try:
        run_script(script, quant, rest)
    except (AttachError, CheckpointError, CoverageError, ScriptError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"hf-quant: {error}", file=sys.stderr)
    return 2


def _parser(add_help: bool = True) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    return HfArgumentParser(  # type: ignore[no-any-return]
        QuantArguments,
        prog="hf-quant",
        usage="hf-quant SCRIPT [--quant METHOD] [--quant_* ...] [the script's own arguments]",
        description=__doc__,
        allow_abbrev=False,
        add_help=add_help,
    )


def split_argv(argv: list[str]) -> tuple[Path, QuantArguments, list[str]]:
    """Separate (script, our flags, the script's own arguments).

    Raises:
        ValueError: The first argument is no file, a flag starts with ``--quant`` and is none of ours, or no
            flag says which method.
    """
    script = Path(argv[0])
    if not script.is_file():
        raise ValueError(
            explain(
                "hf-quant", "a Python script as the first argument", repr(argv[0]), "hf-quant SCRIPT --quant pege ..."
            )
        )
    mine, rest = _divide(argv[1:])
    names = {_name(word) for word in mine}
    if not names & {"quant", "quant_config"}:
        raise ValueError(
            explain(
                "hf-quant",
                "--quant METHOD or --quant_config FILE",
                "neither",
                f"--quant is one of {', '.join(ESTIMATORS)}; --quant none trains as if we were not there.",
            )
        )
    (quant,) = _parser(add_help=False).parse_args_into_dataclasses(args=mine, look_for_args_file=False)
    return script, quant, rest


def _divide(argv: list[str]) -> tuple[list[str], list[str]]:
    """(our flags with their values, everything else untouched and in order); nothing after ``--`` is ours."""
    known = {f.name for f in fields(QuantArguments)}
    mine: list[str] = []
    rest: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if word == "--":
            rest += [word, *words]
            break
        if not word.startswith("--quant"):
            rest.append(word)
            continue
        name = _name(word)
        if name not in known:
            raise ValueError(unknown("flag", name, known, "hf-quant"))
        mine.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            mine.append(words.popleft())
        while name == "quant_option" and words and re.match(r"\w+=", words[0]):
            mine.append(words.popleft())
    return mine, rest


def _name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def run_script(script: Path, quant: QuantArguments, argv: list[str]) -> dict[str, Any]:
    """Run a script as ``__main__`` with every Trainer it builds quantized; returns its globals.

    Args:
        script: The file.
        quant: Our flags; ``quant.quant == "none"`` runs the script as it is.
        argv: The script's own arguments.

    Raises:
        ScriptError: The script ended without building a Trainer, or without training where an export was
            asked for.
    """
    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.resolve().parent))
    built: list[Any] = []
    result: dict[str, Any] = {}
    try:
        if quant.to_config() is None:
            return runpy.run_path(str(script), run_name="__main__")
        with quantized_trainers(quant, built):
            result = runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0) or {"-h", "--help"} & set(argv):
            raise
    finally:
        sys.argv, sys.path[:] = saved_argv, saved_path
    if not built:
        raise ScriptError(
            explain(
                str(script),
                "a script that builds a transformers.Trainer",
                "none built",
                "In a hand-written loop use lightning_quant.attach and QuantController.",
            )
        )
    if quant.quant_export is not None and not any(t.quant_exported for t in built):
        raise ScriptError(
            explain(
                str(script),
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
        if not isinstance(self, QuantTrainerMixin):
            cls = type(self)
            self.__class__ = type(f"Quant{cls.__name__}", (QuantTrainerMixin, cls), {"__module__": cls.__module__})
            self.init_quant(quant)
            original(self, model, *args, **kwargs)
            self.finish_init_quant()
        else:
            original(self, model, *args, **kwargs)
        if built is not None:
            built.append(self)

    Trainer.__init__ = init
    try:
        yield
    finally:
        Trainer.__init__ = original


if __name__ == "__main__":
    sys.exit(main())
