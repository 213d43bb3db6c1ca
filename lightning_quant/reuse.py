"""Layers that read the same input (query, key and value; gate and up) quantize it once.

A model calls such layers one after the other with one tensor object.  The last result is remembered by weak
references, so it lives exactly as long as autograd keeps it for the layers' own backward passes: nothing is
held, and where nothing kept it the next layer computes it again.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

Kind = tuple[object, ...]

_last: tuple[weakref.ref[Tensor], int, Kind, weakref.ref[Tensor], int] | None = None


def allowed(x: Tensor) -> bool:
    """Whether results for ``x`` are worth remembering: eager training (a compiler shares by itself)."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.requires_grad


def find(x: Tensor, kind: Kind) -> Tensor | None:
    """What the last layer made of this very tensor on the same kind of grid, if neither has changed since."""
    if _last is None:
        return None
    source, source_version, last_kind, result, result_version = _last
    if source() is not x or x._version != source_version or last_kind != kind:
        return None
    y = result()
    return y if y is not None and y._version == result_version else None


def remember(x: Tensor, kind: Kind, y: Tensor) -> None:
    """Note a result."""
    global _last
    _last = (weakref.ref(x), x._version, kind, weakref.ref(y), y._version)
