"""Multiply-accumulates of a forward pass and the numbers it moves, layer by layer, from shapes alone.

The forward runs on the meta device, where nothing is computed and no weight has memory, and every product of PyTorch
is seen as it passes, whatever module or function made it.  What is elementwise (activations, normalizations, residual
sums, masks) costs nothing here: kernels do it on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_quant.errors import explain
from lightning_quant.experts import expert_weights

LOOKUP = torch.ops.aten.embedding


@dataclass(frozen=True)
class Use:
    """One operation of a forward pass.

    Attributes:
        path: The module that computed it.
        kind: ``product`` with weights, ``embedding``, ``experts``, or ``attention``: products without weights.
        weights: Names of the parameters it reads; biases are among them.
        share: Of the weights' rows, how many are read: less than 1 for embeddings and experts.
        macs: Multiply-accumulates, each two floating-point operations.
        inputs: Numbers it reads beside weights, keys and values.
        outputs: Numbers it writes.
        cached: Keys and values it reads, as they lie in the cache.
        fresh: Those among them that this forward has made.
    """

    path: str
    kind: str
    weights: tuple[str, ...] = ()
    share: float = 1.0
    macs: int = 0
    inputs: int = 0
    outputs: int = 0
    cached: int = 0
    fresh: int = 0


@dataclass(frozen=True)
class Counted:
    """What one forward pass does.

    Attributes:
        uses: Its operations, in order.
        called: Paths of the modules that were called.
        output: What the model returned, on the meta device.
    """

    uses: tuple[Use, ...]
    called: frozenset[str]
    output: Any

    @property
    def macs(self) -> int:
        """Multiply-accumulates of them all."""
        return sum(use.macs for use in self.uses)


def count(model: nn.Module, inputs: Mapping[str, Any]) -> Counted:
    """Run a forward on shapes and count.

    Causal attention has the pairs of queries and keys that its mask leaves, in its window if it has one.  A token's
    experts are taken to be drawn evenly, so that of n tokens with k of E experts each ``E (1 - (1 - k/E)^n)`` are read.

    Args:
        model: With all parameters on the meta device.
        inputs: Arguments of its forward, tensors on the meta device.

    Raises:
        ValueError: Parameters elsewhere, or a forward that asks for values.
    """
    if any(not p.is_meta for p in model.parameters()):
        cure = "Build it under torch.device('meta')."
        raise ValueError(explain("count", "a model on the meta device", "parameters with values", cure))
    chooses = hasattr(model, "set_experts_implementation") and any(expert_weights(m) for m in model.modules())
    routed: Any = model if chooses else None
    implementation = routed and routed.config._experts_implementation
    counter = _Counter(model)
    hooks = [hook for path, module in model.named_modules() for hook in counter.watch(path, module)]
    try:
        if routed is not None:
            routed.set_experts_implementation("batched_mm")  # which asks for no values
        with torch.no_grad(), counter:
            output = model(**inputs)
    except (NotImplementedError, RuntimeError) as error:
        where, cure = type(model).__name__, "It cannot be counted without weights; count a model like it."
        raise ValueError(explain(where, "a forward that runs on shapes alone", repr(error)[:300], cure)) from error
    finally:
        for hook in hooks:
            hook.remove()
        if routed is not None:
            routed.set_experts_implementation(implementation)
    return Counted(tuple(counter.uses), frozenset(counter.called), output)


def pairs(queries: int, keys: int, window: int | None = None) -> int:
    """Pairs that a causal mask leaves, the last query beside the last key, each query with ``window`` keys at most.

    >>> pairs(4, 4), pairs(1, 9), pairs(4, 4, window=2), pairs(1, 9, window=2)
    (10, 9, 7, 2)
    """
    first, top = keys - queries + 1, min(keys, window or keys)
    rising = (first + top) * (top - first + 1) // 2 if top >= first else 0
    return rising + top * (keys - max(top, first - 1))


@dataclass
class _Frame:
    """A module that is being called."""

    path: str
    module: nn.Module
    cache: Any
    queries: int  # of attention: rows of its input; PyTorch may fold heads into those of a product
    routed: bool
    products: list[tuple[int, int, int]] = field(default_factory=list)  # of attention: macs, inputs, outputs
    keys: int = 0  # of attention: numbers that the products read, where there is no cache


class _Counter(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[StorageWeakRef, str] = {}
        for name, parameter in model.named_parameters():
            self.names.setdefault(_place(parameter), name)
        self.uses: list[Use] = []
        self.called: set[str] = set()
        self.frames: list[_Frame] = []

    def watch(self, path: str, module: nn.Module) -> list[Any]:
        """Hooks that say which module is being called."""
        experts = [part.name for part in expert_weights(module)]

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, *kwargs.values())
            cache = next((a for a in given if hasattr(a, "get_seq_length")), None)
            rows = next((a.shape[-2] for a in given if isinstance(a, Tensor) and a.ndim > 1), 1)
            self.called.add(path)
            self.frames.append(_Frame(path, module, cache, rows, bool(experts)))

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            frame = self.frames.pop()
            if experts:
                self.uses.append(_routed(path, module, experts, [*args, *kwargs.values()], output))
            elif frame.products:
                self.uses.append(_attention(frame))

        before = module.register_forward_pre_hook(enter, with_kwargs=True)
        return [before, module.register_forward_hook(leave, with_kwargs=True)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        counts = operation is LOOKUP or operation in flop_registry
        if counts and self.frames and not self.frames[-1].routed:
            self._note(operation, [a for a in args if isinstance(a, Tensor)], args, kwargs, out)
        return out

    def _note(self, operation: Any, tensors: list[Tensor], args: Any, kwargs: Any, out: Tensor) -> None:
        frame = self.frames[-1]
        keys = [_place(t) for t in tensors]
        weights = tuple(self.names[key] for key in keys if key in self.names)
        inputs = sum(t.numel() for t, key in zip(tensors, keys, strict=True) if key not in self.names)
        if operation is LOOKUP:
            share = min(1.0, out.numel() / tensors[0].numel())
            self.uses.append(Use(frame.path, "embedding", weights, share, outputs=out.numel()))
            return
        formula: Callable[..., int] = flop_registry[operation]
        macs = formula(*args, **kwargs, out_val=out) // 2
        if not weights and "attention" in type(frame.module).__name__.lower():
            _join(frame, tensors[-2:], macs, out)
            return
        self.uses.append(Use(frame.path, "product", weights, 1.0, macs, inputs, out.numel()))


def _place(tensor: Tensor) -> StorageWeakRef:
    """What a parameter and its views share."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _join(frame: _Frame, operands: list[Tensor], macs: int, out: Tensor) -> None:
    """A product of attention: scores, which no memory sees, and then their product with values, by turns."""
    left, right = operands
    scores = len(frame.products) % 2 == 0
    keys = right.shape[-1] if scores else left.shape[-1]
    frame.keys += right.numel()
    layer = _cached(frame)
    if getattr(frame.module, "is_causal", frame.cache is not None):
        seen = pairs(frame.queries, keys, getattr(layer, "sliding_window", None))
        macs = macs * seen // (frame.queries * keys)
    frame.products.append((macs, left.numel() if scores else 0, 0 if scores else out.numel()))


def _cached(frame: _Frame) -> Any:
    """What the cache keeps for an attention module; None without one."""
    layers, index = getattr(frame.cache, "layers", None), getattr(frame.module, "layer_idx", None)
    return layers[index] if layers and index is not None and index < len(layers) else None


def _attention(frame: _Frame) -> Use:
    macs, inputs, outputs = (sum(column) for column in zip(*frame.products, strict=True))
    layer = _cached(frame)
    held = [t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    cached = sum(t.numel() for t in held) or frame.keys
    fresh = sum(t.numel() // t.shape[-2] * min(frame.queries, t.shape[-2]) for t in held)
    return Use(frame.path, "attention", (), 1.0, macs, inputs, outputs, cached, fresh)


def _routed(path: str, module: nn.Module, names: list[str], args: list[Tensor], output: Tensor) -> Use:
    """Fused experts: each token multiplies with the matrices of the experts that it is sent to."""
    tokens, chosen = args[1].shape
    weights: list[Tensor] = [module._parameters[name] for name in names]  # type: ignore[misc]
    experts = weights[0].shape[0]
    macs = sum(tokens * chosen * (w.numel() // experts) for w in weights)
    share = 1 - (1 - chosen / experts) ** tokens
    read = tuple(f"{path}.{name}" for name in module._parameters)
    return Use(path, "experts", read, share, macs, args[0].numel(), output.numel())
