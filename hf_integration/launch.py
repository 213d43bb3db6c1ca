"""``hf-quant SCRIPT ...``: run an unmodified script that builds a ``transformers.Trainer``, quantized.

Our flags are taken off the command line, the script sees its own.  Also ``python -m hf_integration`` and,
on many GPUs, ``accelerate launch -m hf_integration`` or ``torchrun -m hf_integration``.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_integration.arguments import QuantArguments
from lightning_quant.errors import explain


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        _parser().print_help()
        return 0 if arguments else 2
    try:
        script, quant, rest = split_argv(arguments)
        if quant.quant_export is not None:
            from hf_integration.trainer import check_free

            check_free(quant.quant_export)
        quant.to_config()
    except (ValueError, OSError) as error:
        print(f"hf-quant: {error}", file=sys.stderr)
        return 2
    run_script(script, quant, rest)
    return 0


def _parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    return HfArgumentParser(  # type: ignore[no-any-return]
        QuantArguments,
        prog="hf-quant",
        usage="hf-quant SCRIPT [--quant METHOD] [--quant_* ...] [the script's own arguments]",
        description=__doc__,
        allow_abbrev=False,
    )


def split_argv(argv: list[str]) -> tuple[Path, QuantArguments, list[str]]:
    """Separate (script, our flags, the script's own arguments).

    Raises:
        ValueError: The first argument is no file, or a flag starts with ``--quant`` and is none of ours.
    """
    script = Path(argv[0])
    if not script.is_file():
        raise ValueError(
            explain(
                "hf-quant", "a Python script as the first argument", repr(argv[0]), "hf-quant SCRIPT --quant pege ..."
            )
        )
    known = {f.name for f in fields(QuantArguments)}
    for word in argv[1:]:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if word.startswith("--quant") and name not in known:
            from lightning_quant.errors import unknown

            raise ValueError(unknown("flag", name, known, "hf-quant"))
    quant, rest = _parser().parse_args_into_dataclasses(args=argv[1:], return_remaining_strings=True)
    return script, quant, list(rest)


def run_script(script: Path, quant: QuantArguments, argv: list[str]) -> dict[str, Any]:
    """Run a script as ``__main__`` with every Trainer it builds quantized; returns its globals.

    Args:
        script: The file.
        quant: Our flags; ``quant.quant == "none"`` runs the script as it is.
        argv: The script's own arguments.

    Raises:
        RuntimeError: The script ended without building a Trainer.
    """
    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.resolve().parent))
    built: list[Any] = []
    try:
        if quant.to_config() is None:
            return runpy.run_path(str(script), run_name="__main__")
        with quantized_trainers(quant, built):
            result = runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = saved_argv, saved_path
    if not built:
        raise RuntimeError(
            explain(
                str(script),
                "a script that builds a transformers.Trainer",
                "none built",
                "In a hand-written loop use lightning_quant.attach and QuantController.",
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
            if model is not None:
                self.attach_quant(model)
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
