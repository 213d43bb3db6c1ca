"""A part of a model that is rounded at once: its layers, and the calls that calibration makes of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_quant.attach import quant_layers
from lightning_quant.layers import QuantEmbedding, QuantLayer
from lightning_quant.rounding.held import Held
from lightning_quant.transforms.pairs import Inputs

Errors = dict[str, tuple[float, float]]


@dataclass
class Call:
    """Arguments of one call.

    Attributes:
        args: By position.
        kwargs: By name.
        path: Submodule that they are for; empty for the module itself.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    @staticmethod
    def of(batch: Any) -> Call:
        """A batch of any of the usual forms: keyword arguments, positional ones, one tensor, or ``Inputs``."""
        if isinstance(batch, Inputs):
            return Call(batch.args, batch.kwargs, batch.path)
        if isinstance(batch, Mapping):
            return Call((), dict(batch))
        return Call(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))

    def run(self, module: nn.Module) -> Any:
        """The module's output; the arguments stay as they are."""
        args, kwargs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (self.args, self.kwargs))
        return module.get_submodule(self.path)(*args, **kwargs)


@dataclass
class Unit:
    """What a rounding works on.

    Attributes:
        path: The module's path in the model; empty for the model itself.
        module: The module, in evaluation mode.
        calls: What reaches it when everything before it is rounded.
        float_calls: What reaches it in the float model; None where a rounding does not ask for it.
        targets: Its outputs there.
        weights: Importance of each number of the output, of mean 1; None: all alike.
        seed: Of what is drawn.
        kept: Layers that are not to be touched, by path.
        nearest: Filled with layers that were rounded to nearest, and why.
    """

    path: str
    module: nn.Module
    calls: list[Call]
    float_calls: list[Call] | None = None
    targets: list[Tensor] | None = None
    weights: list[Tensor] | None = None
    seed: int = 0
    kept: frozenset[str] = frozenset()
    nearest: dict[str, str] = field(default_factory=dict)

    def layers(self) -> dict[str, QuantLayer]:
        """The layers to round, by path in the model."""
        head = f"{self.path}." if self.path else ""
        found = {(head + name if name else self.path): layer for name, layer in quant_layers(self.module)}
        return {path: layer for path, layer in found.items() if path not in self.kept}

    def readers(self) -> dict[str, QuantLayer]:
        """Those of them that read activations; the rest is rounded to nearest here and now."""
        found = {}
        for path, layer in self.layers().items():
            reason = "its input is indices" if isinstance(layer, QuantEmbedding) else ""
            reason = "fused experts: who reads which token is not seen" if not layer.input_channels else reason
            if reason:
                self.to_nearest(path, layer, reason)
            else:
                found[path] = layer
        return found

    def to_nearest(self, path: str, layer: QuantLayer, reason: str) -> None:
        """Round a layer to nearest and say why."""
        held = Held(layer, path)
        held.write(held.nearest(held.rows))
        self.nearest[path] = reason

    def generator(self) -> torch.Generator:
        """Random numbers of this unit: the same whatever was rounded before it."""
        return torch.Generator().manual_seed(zlib.crc32(self.path.encode()) ^ self.seed)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output that is no mere number (a loss): the hidden states, where there are several."""
    found: Tensor = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.ndim)
    return found


@contextmanager
def watched(layers: dict[str, QuantLayer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, ``see(path, input)`` is called whenever one of the layers runs."""

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: see(path, (args[0] if args else kwargs["input"]).detach())

    handles = [m.register_forward_pre_hook(hook(p), with_kwargs=True) for p, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stages(unit: Unit, layers: dict[str, QuantLayer]) -> list[list[str]]:
    """Layers in the order they run; those that read one and the same tensor together.

    Seen on the first call.  Layers that did not run there are a last stage.
    """
    order: list[tuple[str, Tensor]] = []
    with watched(layers, lambda path, x: order.append((path, x))), torch.no_grad():
        unit.calls[0].run(unit.module)
    found: list[list[str]] = []
    last: Tensor | None = None
    seen: set[str] = set()
    for path, x in order:
        if path in seen:
            continue
        seen.add(path)
        same = last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape
        if same:
            found[-1].append(path)
        else:
            found.append([path])
        last = x
    rest = [path for path in layers if path not in seen]
    return [*found, rest] if rest else found
