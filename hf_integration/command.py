"""The command line of ``hf-quant``: which words are ours, and which the script's."""

from __future__ import annotations

import argparse
import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hf_integration.arguments import QuantArguments
from lightning_quant.errors import explain, unknown
from lightning_quant.estimators import ESTIMATORS
from lightning_quant.spec import YamlLoader


class ScriptError(RuntimeError):
    """The script did not do what the flags need it to."""


@dataclass(frozen=True)
class Command:
    """A command line, taken apart.

    Attributes:
        script: The file to run.
        quant: Our flags.
        argv: The script's own arguments, in order.
        taken: Names that were taken out of what is the script's otherwise: from the words behind it, from its file.
    """

    script: Path
    quant: QuantArguments
    argv: list[str]
    taken: frozenset[str]


def parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Reads our flags."""
    from transformers import HfArgumentParser

    return HfArgumentParser(  # type: ignore[no-any-return]
        QuantArguments,
        prog="hf-quant",
        usage="hf-quant SCRIPT [--quant METHOD] [--quant_* ...] [the script's own arguments]\n"
        "       hf-quant --quant METHOD [--quant_* ...] SCRIPT [arguments that are all the script's]",
        description="Run an unmodified script that builds a transformers.Trainer, quantized. Where all that the "
        "script is given is a JSON or YAML file, the flags may stand in it, without the dashes.",
        allow_abbrev=False,
        add_help=add_help,
    )


def split_argv(argv: list[str]) -> Command:
    """Take a command line apart.

    Our flags stand before the script, whose words are then all its own, or anywhere behind it up to ``--``; where the
    script is given one JSON or YAML file and nothing else, also in that.  The command line outdoes the file.

    Raises:
        ValueError: No script, a flag that looks like ours and is none, or none that says which method.
    """
    mine, rest = _divide(argv, stop=True) if argv[0].startswith("-") else ([], argv)
    if not rest or not Path(rest[0]).is_file():
        got = repr(rest[0]) if rest else "none"
        cure = "hf-quant SCRIPT --quant pege ..., or hf-quant --quant pege SCRIPT ..."
        raise ValueError(explain("hf-quant", "a Python script", got, cure))
    script, own, taken = Path(rest[0]), rest[1:], set()
    if not mine:
        mine, own = _divide(own)
        file = _file_words(own)
        mine = file + mine
        taken = {_name(word) for word in mine if word.startswith("--")}
    if not {"quant", "quant_config"} & {_name(word) for word in mine}:
        cure = f"--quant is one of {', '.join(ESTIMATORS)}; --quant none trains as if we were not there."
        raise ValueError(explain("hf-quant", "--quant METHOD or --quant_config FILE", "neither", cure))
    (quant,) = parser(add_help=False).parse_args_into_dataclasses(args=mine, look_for_args_file=False)
    return Command(script, quant, own, frozenset(taken))


def _divide(argv: list[str], stop: bool = False) -> tuple[list[str], list[str]]:
    """(Our flags with their values, everything else untouched and in order); nothing behind ``--`` is ours.

    Args:
        argv: Words.
        stop: At the first that is not ours.
    """
    mine: list[str] = []
    rest: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith("--") or not _ours(_name(word), "flag", "hf-quant"):
            rest.append(word)
            if stop or word == "--":
                break
            continue
        mine.append(word)
        if "=" not in word and words and not words[0].startswith("--"):
            mine.append(words.popleft())
        while _name(word) == "quant_option" and words and re.match(r"\w+=", words[0]):
            mine.append(words.popleft())
    return mine, [*rest, *words]


def _ours(name: str, kind: str, where: str) -> bool:
    """Whether a name is one of our settings; words of their own, as in --quantile and --quantization_bits, are not.

    Raises:
        ValueError: It looks like one and is none.
    """
    known = {f.name for f in fields(QuantArguments)}
    if name in known:
        return True
    if name.startswith("quant") and not name.startswith(("quanti", "quantum")):
        raise ValueError(unknown(kind, name, known, where))
    return False


def _name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _file_words(argv: list[str]) -> list[str]:
    """Our settings in the JSON or YAML file that is all the script is given, as flags."""
    if len(argv) != 1 or not argv[0].endswith((".json", ".yaml", ".yml")) or not Path(argv[0]).is_file():
        return []
    text = Path(argv[0]).read_text(encoding="utf-8")
    try:
        data = json.loads(text) if argv[0].endswith(".json") else yaml.load(text, YamlLoader)
    except (json.JSONDecodeError, yaml.YAMLError):
        return []  # the script reads it too, and says so
    words: list[str] = []
    for name, value in data.items() if isinstance(data, dict) else ():
        if not _ours(str(name), "setting", argv[0]) or value is None:
            continue
        if isinstance(value, dict):
            value = [f"{key}={json.dumps(each)}" for key, each in value.items()]
        words += [f"--{name}={each}" for each in (value if isinstance(value, list) else [value])]
    return words


@contextmanager
def without_ours(taken: frozenset[str]) -> Iterator[None]:
    """While open, the script's own reader of a JSON or YAML file does not see our settings.

    Args:
        taken: Their names, and those of the flags that were taken from the command line.

    Raises:
        ScriptError: The script has a flag or setting of such a name itself.
    """
    from transformers import HfArgumentParser

    known_args, of_dict = argparse.ArgumentParser.parse_known_args, HfArgumentParser.parse_dict

    def parse_known_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        _refuse_clash(self, taken)
        return known_args(self, *args, **kwargs)

    def parse_dict(self: Any, args: dict[str, Any], *more: Any, **kwargs: Any) -> Any:
        _refuse_clash(self, taken)
        return of_dict(self, {k: v for k, v in args.items() if k not in taken}, *more, **kwargs)

    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[assignment,method-assign]
    HfArgumentParser.parse_dict = parse_dict
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = known_args  # type: ignore[method-assign]
        HfArgumentParser.parse_dict = of_dict


def _refuse_clash(script: argparse.ArgumentParser, taken: frozenset[str]) -> None:
    flags = sorted({flag for action in script._actions for flag in action.option_strings if _name(flag) in taken})
    if flags:
        got = f"one with {', '.join(flags)} of its own"
        cure = (
            "Put ours before the script, hf-quant --quant pege SCRIPT ...; what quantizes by itself: run with python."
        )
        raise ScriptError(explain("the script", "a script that leaves --quant* to hf-quant", got, cure))
