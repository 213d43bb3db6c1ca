"""A directory that appears complete or not at all, and what an interrupted one leaves behind to go on from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_quant import distributed
from lightning_quant.errors import CheckpointError, explain

SUMS = "SHA256SUMS"
BLOCK = 2**22


class Journal:
    """What of an export is finished, beside its unfinished directory; written anew, whole, after each shard.

    Args:
        path: Its file.
        fingerprint: What the export is made of and how: nothing made otherwise may go on from it.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path, self.fingerprint = path, dict(fingerprint)
        self.shards: list[dict[str, Any]] = []

    def read(self) -> None:
        """Take over what an interrupted run had finished; nothing if there is none.

        Raises:
            CheckpointError: It was another export.
        """
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        old = data["fingerprint"]
        odd = [key for key in sorted({*old, *self.fingerprint}) if old.get(key) != self.fingerprint.get(key)]
        if odd:
            got = f"one that differs in {', '.join(odd)}"
            cure = "Export without resume, which starts over."
            where = str(self.path.parent / self.path.name.removeprefix(".").removesuffix(".partial.json"))
            raise CheckpointError(explain(where, "an interrupted export of the same", got, cure))
        self.shards = data["shards"]

    def add(self, shard: dict[str, Any]) -> None:
        """Note a finished shard."""
        self.shards.append(shard)
        temporary = self.path.with_suffix("") / "journal.tmp"  # among what is unfinished: removed with it
        temporary.write_text(json.dumps({"fingerprint": self.fingerprint, "shards": self.shards}), encoding="utf-8")
        flush(temporary)
        os.replace(temporary, self.path)


def fingerprint(*directories: Path, **settings: Any) -> dict[str, Any]:
    """What must be the same for an export to go on: sizes and times of files, settings, versions.

    Args:
        directories: Their files are part of it, subdirectories are not.
        settings: Plain values.
    """
    from lightning_quant.version import __version__

    found: dict[str, Any] = {"version": __version__, **settings}
    for directory in directories:
        for file in sorted(p for p in directory.iterdir() if p.is_file()):
            stat = file.stat()
            found[f"{directory}/{file.name}"] = [stat.st_size, stat.st_mtime_ns]
    return found


@contextmanager
def new_directory(
    path: Path, overwrite: bool = False, journal: Journal | None = None, resume: bool = False
) -> Iterator[Path]:
    """An unfinished directory beside ``path`` that becomes it if the block ends well.

    If the block fails it vanishes, and ``path`` is as it was; what a killed process left behind is removed by the next.

    Args:
        path: The directory to be.
        overwrite: Replace an existing one once the new one is complete.
        journal: Where the block notes what is finished.
        resume: Go on from what an interrupted run noted there, and keep what is finished if the block fails.

    Raises:
        FileExistsError: ``path`` exists; nothing is touched.
        OSError: Another process is writing there, or the disk is full.
    """
    old = path.with_name(f".{path.name}.old")
    if distributed.rank() == 0 and old.is_dir() and not path.exists():  # killed between the two renames
        os.replace(old, path)
    if path.exists() and not overwrite:
        cure = "Choose another, remove it, or overwrite it."
        raise FileExistsError(explain(str(path), "a directory that does not exist yet", "an existing one", cure))
    distributed.barrier()  # no rank looks after another has finished
    temporary, noted = path.with_name(f".{path.name}.partial"), _noted(path)
    if distributed.rank() != 0:
        yield temporary
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _lock(lock, path)
        if resume and journal is not None:
            journal.read()
        else:
            noted.unlink(missing_ok=True)
        _clear(temporary, journal)
        try:
            yield temporary
            _complete(temporary)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(temporary, path)
            flush(path.parent)
        except BaseException as error:
            if not resume:
                shutil.rmtree(temporary, ignore_errors=True)
                noted.unlink(missing_ok=True)
            if isinstance(error, OSError) and not isinstance(error, FileExistsError):
                cure = "Free space for it, or choose another disk; nothing half-written was left there."
                raise OSError(explain(str(path), "a disk that takes the export", str(error), cure)) from error
            raise
        shutil.rmtree(old, ignore_errors=True)
        noted.unlink(missing_ok=True)
    finally:
        os.close(lock)


def journal_of(path: Path, made_of: Mapping[str, Any]) -> Journal:
    """The journal of the export to ``path``."""
    return Journal(_noted(path), made_of)


def _noted(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial.json")


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        expected, cure = "no other process exporting there", "Wait for it, or choose another directory."
        raise OSError(explain(str(path), expected, "one that is", cure)) from error


def _clear(temporary: Path, journal: Journal | None) -> None:
    """Remove what is not a finished shard; those in the journal that are not whole are forgotten, with all after."""
    finished: dict[str, int] = {}
    for number, shard in enumerate(journal.shards if journal is not None else ()):
        named = [*temporary.glob(f"model-{number + 1:05d}-of-*.safetensors"), temporary / "model.safetensors"]
        for renamed in named if number == 0 else named[:-1]:  # killed while the last names were given
            if renamed.is_file():
                os.replace(renamed, temporary / f"shard-{number}")
        file = temporary / f"shard-{number}"
        if not file.is_file() or file.stat().st_size != shard["size"]:
            break
        finished[file.name] = number
    if journal is not None:
        del journal.shards[len(finished) :]
    for entry in temporary.iterdir():
        if entry.name not in finished:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def write_sums(directory: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS of all files of a directory, as ``sha256sum -c`` reads it.

    Args:
        directory: The directory.
        known: File -> digest, where that is known already.
    """
    files = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    lines = [f"{known.get(name) or digest(directory / name)}  {name}\n" for name in files if name != SUMS]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(directory: Path) -> list[str] | None:
    """Files that are not as SHA256SUMS says, and how; None where there is no such file."""
    path = directory / SUMS
    if not path.is_file():
        return None
    try:
        listed = dict(line.split("  ", 1)[::-1] for line in path.read_text(encoding="utf-8").splitlines())
    except ValueError:
        return [f"{SUMS} (not in the format of sha256sum)"]
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {SUMS}
    odd = [f"{name} (missing)" for name in sorted(set(listed) - present)]
    odd += [f"{name} (extra)" for name in sorted(present - set(listed))]
    return odd + [f"{n} (changed)" for n in sorted(present & set(listed)) if digest(directory / n) != listed[n]]


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complete(directory: Path) -> None:
    for entry in directory.rglob("*"):
        flush(entry)
    flush(directory)
