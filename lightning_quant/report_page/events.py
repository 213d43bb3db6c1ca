"""Scalars of TensorBoard's event files, read without TensorBoard.

A file is a row of records: length (8 bytes, little-endian), its checksum (4), the record, its checksum (4).  A record
is a protocol buffer ``Event``: 2 ``step``, 5 ``summary``, in which each 1 is a value: 1 ``tag``, 2 ``simple_value``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

Series = list[tuple[int, float]]


def read_events(path: Path) -> dict[str, Series]:
    """Scalars by tag, as (step, value), in the order they were written.

    Args:
        path: An event file.  One that a killed run left unfinished is read as far as it goes.
    """
    found: dict[str, Series] = {}
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", head)
            left = path.stat().st_size - file.tell()
            record = file.read(length) if length <= left else b""
            if len(record) < length or len(file.read(4)) < 4:
                break
            step, summaries = 0, []
            for number, value in _fields(record):
                if number == 2 and isinstance(value, int):
                    step = value
                elif number == 5 and isinstance(value, bytes):
                    summaries.append(value)
            for tag, scalar in (pair for summary in summaries for pair in _scalars(summary)):
                found.setdefault(tag, []).append((step, scalar))
    return found


def _scalars(summary: bytes) -> Iterator[tuple[str, float]]:
    for number, value in _fields(summary):
        if number == 1 and isinstance(value, bytes):
            parts = dict(_fields(value))
            tag, scalar = parts.get(1), parts.get(2)
            if isinstance(tag, bytes) and isinstance(scalar, float):
                yield tag.decode("utf-8", "replace"), scalar


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Numbers and values of a protocol buffer's fields; stops at what is none."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value: int | float | bytes
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind in (1, 5):
            form, size = ("<d", 8) if kind == 1 else ("<f", 4)
            if at + size > len(data):
                return
            (value,), at = struct.unpack_from(form, data, at), at + size
        else:
            return
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            break
    return value, at
