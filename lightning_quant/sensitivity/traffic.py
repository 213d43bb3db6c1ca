"""What passes through a model's layers, seen by running one batch: multiplications, shared tensors, shared grids.

Layers are tied, which means that their inputs must have one width, where

* they read the very same tensor, or views of all of it: it lies on one grid, and is rounded once;
* their outputs meet in an addition or concatenation whose operands share a quantizer (``QuantConfig.operators``), on
  their way through anything that is no layer: activations, norms, pools, earlier additions.

Source of the first: Yao et al., "HAWQ-V3", ICML 2021, arXiv:2011.10680, figure 2, where the two convolutions at the
head of a residual block read one quantized input.  Where all schemes have inputs of one width, ties change nothing.

Both are seen on the tensors themselves: every operation is watched, and what it makes carries the names of the layers
that it was made of, until a layer reads it.  No graph is traced and no name of a module means anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_quant.experts import ExpertWeight, QuantExperts
from lightning_quant.layers import QuantEmbedding, QuantLayer, layer_class
from lightning_quant.operators import QuantOperators, QuantPool
from lightning_quant.quantizer import FakeQuantizer


@dataclass
class Traffic:
    """What one batch showed.

    Attributes:
        macs: Multiply-accumulates of each layer (path), quantized or in float, for the whole batch.
        rows: Rows of a Linear layer's input in its largest call.
        tied: Sets of quantized layers that are tied.
    """

    macs: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rows: dict[str, int] = field(default_factory=dict)
    tied: list[set[str]] = field(default_factory=list)


@torch.no_grad()
def watch(model: nn.Module, run: Callable[[], Any]) -> Traffic:
    """Run a batch and look.

    Products of two activations (attention's) belong to no layer and are not counted, nor are additions of biases.

    Args:
        model: With quantizers, which are best switched off.
        run: Its forward.
    """
    found, origins = Traffic(), _Origins()
    readers: dict[tuple[int, ...], set[str]] = defaultdict(set)
    meeting: dict[int, set[str]] = defaultdict(set)
    tokens: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
    fresh = count()

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first(args, kwargs)
            if x is not None and isinstance(module, QuantLayer) and x.is_floating_point():
                whole = x if x._base is None else x._base
                if whole not in tokens:  # a number of its own while it lives: addresses are used again
                    tokens[whole] = next(fresh)
                version = 0 if x.is_inference() else x._version
                readers[tokens[whole], version, int(x.storage_offset()), x.numel()].add(path)

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = _first(args, kwargs)
            if x is not None and isinstance(y, Tensor):
                found.macs[path] += _macs(module, x, y)
                if module.weight.ndim == 2:  # type: ignore[union-attr]
                    found.rows[path] = max(found.rows.get(path, 0), x.numel() // max(x.shape[-1], 1))
                if isinstance(module, QuantLayer):
                    origins.of[y] = frozenset([path])

        return hook

    def through_experts(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            places = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not t.is_floating_point()]
            for name, part in module.named_children():
                if isinstance(part, ExpertWeight) and places:  # each place of the routing table is one row
                    inner = f"{path}.{name}" if path else name
                    found.macs[inner] += places[0].numel() * part.weight[0].numel()

        return hook

    def operand(module: nn.Module, args: tuple[Any, ...]) -> None:
        meeting[id(module)] |= origins.of.get(args[0], frozenset())

    handles = []
    for path, module in model.named_modules():
        if _multiplies(module):
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path), with_kwargs=True))
        elif isinstance(module, QuantExperts):
            handles.append(module.register_forward_hook(through_experts(path), with_kwargs=True))
        elif isinstance(module, (QuantOperators, QuantPool)):
            own = [child for child in module.children() if isinstance(child, FakeQuantizer)]
            handles += [q.register_forward_pre_hook(operand) for q in own]
    try:
        with origins:
            run()
    finally:
        for handle in handles:
            handle.remove()
    found.tied = [group for group in (*readers.values(), *meeting.values()) if len(group) > 1]
    return found


class _Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which layers each tensor was made of since layers last read anything."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: MutableMapping[Tensor, frozenset[str]] = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [self.of[t] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t in self.of]
        if read:
            made = frozenset().union(*read)
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.of[t] = made
        return out


def _multiplies(module: nn.Module) -> bool:
    kind = type(module) if isinstance(module, QuantLayer) else layer_class(type(module))
    return kind is not None and not issubclass(kind, (QuantEmbedding, ExpertWeight)) and module.weight is not None


def _macs(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Multiply-accumulates of one call, off the shapes that pass."""
    kind: Any = type(module) if isinstance(module, QuantLayer) else layer_class(type(module))
    weight: Any = module.weight
    if isinstance(module, nn.modules.conv._ConvTransposeNd):  # each input number meets the kernels of its channel
        return x.numel() * weight.numel() / len(weight)  # type: ignore[no-any-return]
    return y.numel() * weight.numel() / weight.shape[kind.output_axis]  # type: ignore[no-any-return]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), None)


def samples(batch: Any) -> int:
    """Rows of a batch: the first dimension of its first tensor."""
    first = next((t for t in tree_leaves(getattr(batch, "data", batch)) if isinstance(t, Tensor) and t.ndim), None)
    return 1 if first is None else max(len(first), 1)
