"""A model's forwards on all batches at once, which stop at every repeated block.

What a model does between its blocks is its own affair: masks, positions, what it hands on.  So each batch has a thread
with a forward of the model in it, which waits at each block until it is given that block's output.  One thread runs at
a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_quant.errors import explain
from lightning_quant.rounding.unit import Call


class _Stop(BaseException):
    """Raised in a forward that shall not go on."""


class _Forward(threading.Thread):
    """One batch's forward."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__(daemon=True)
        self.model, self.batch = model, batch
        self.arrived, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.place: str | None = None
        self.call: Call | None = None
        self.given: Any = None
        self.error: BaseException | None = None
        self.stopping = False
        self.passed: set[str] = set()

    def run(self) -> None:
        """To the end, or until told to stop."""
        self.go.acquire()
        try:
            with torch.no_grad():
                if not self.stopping:
                    Call.of(self.batch).run(self.model)
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        self.place = None
        self.arrived.release()

    def wait(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called where a block would run."""
        plain = {k: None if hasattr(v, "get_seq_length") else v for k, v in kwargs.items()}  # no cache
        self.place, self.call = path, Call(args, plain)
        self.passed.add(path)
        self.arrived.release()
        self.go.acquire()
        if self.stopping:
            raise _Stop
        given, self.given = self.given, None
        return given


class Walk:
    """Forwards that stop at blocks: a context; what still waits at its end is stopped.

    Args:
        model: In evaluation mode.
        paths: The blocks'.  One that runs twice in a forward is stopped at the first time only.
        batches: Each of any of the usual forms.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], batches: Sequence[Any]) -> None:
        self.model, self.paths = model, list(paths)
        self.forwards = [_Forward(model, batch) for batch in batches]

    def __enter__(self) -> Walk:
        """Stand at the beginning."""
        self.shut_gates()
        for forward in self.forwards:
            forward.start()
        return self

    def shut_gates(self) -> None:
        """Let the blocks stop forwards of walks, this one's and others'."""
        for path in self.paths:
            block = self.model.get_submodule(path)
            block.__dict__.setdefault("forward", _gate(path, block))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what waits."""
        for forward in self.forwards:
            forward.stopping = True
            forward.go.release()
            forward.join()
        for path in self.paths:
            self.model.get_submodule(path).__dict__.pop("forward", None)

    def advance(self, outputs: Sequence[Any] | None = None) -> tuple[str, list[Call]] | None:
        """Go on to the next block.

        Args:
            outputs: Of the block that the forwards stand at, one per batch; None at the beginning.

        Returns:
            The block's path and its calls, one per batch; None at the end.

        Raises:
            ValueError: The batches take different ways.
        """
        for number, forward in enumerate(self.forwards):
            forward.call = None
            forward.given = None if outputs is None else outputs[number]
            forward.go.release()
            forward.arrived.acquire()
            if forward.error is not None:
                raise forward.error
        places = {forward.place for forward in self.forwards}
        if len(places) > 1:
            got = " and ".join(sorted(str(place) for place in places))
            cure = "Round with batches that all run the same blocks."
            raise ValueError(explain("rounding", "batches that reach the same block next", got, cure))
        place = places.pop()
        return None if place is None else (place, [forward.call for forward in self.forwards if forward.call])


def _gate(path: str, block: nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        thread = threading.current_thread()
        if isinstance(thread, _Forward) and path not in thread.passed:
            return thread.wait(path, args, kwargs)
        return type(block).forward(block, *args, **kwargs)

    return forward
