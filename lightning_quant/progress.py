"""Progress bars for what may take longer than two seconds; on the first rank, where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from lightning_quant import distributed

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate, showing a bar once two seconds have passed; ``total`` says how many come, where ``len`` does not."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=what, total=total, delay=2, disable=distributed.rank() != 0, leave=False)
    return bar
