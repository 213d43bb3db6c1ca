"""Which layers read what a layer makes, channel by channel: found by running the model, and proved by it.

A producer's channels are multiplied with powers of two, which float arithmetic carries along without rounding.  Layers
whose inputs come out multiplied in just that way are its consumers: straight from a normalization, through a ReLU, a
gate's product, or attention's weighted mean of values (where keys and values are shared, each head's channels repeat).
Then the consumers' inputs are divided again: if the output is what it was, bit for bit, nothing else reads the
producer.

No table of architectures is needed, and a model whose forward cannot be traced is served as well.  Repeated blocks
(elements of a ``ModuleList``) are run one by one on the inputs they get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_quant.bypass import evaluating
from lightning_quant.errors import explain
from lightning_quant.progress import track
from lightning_quant.transforms.precision import widened

EXPONENTS = 12  # a channel's factor is 2^-12 ... 2^12: activations that saturate are not taken for linear ones


@dataclass
class Call:
    """A module and the arguments it is run with."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        """The tensors of the output, in evaluation mode."""
        copied = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (self.args, self.kwargs))
        with evaluating(self.module):
            return [t for t in tree_leaves(self.module(*copied[0], **copied[1])) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Inputs:
    """A batch as training hands it to the model, or to the submodule of it that does the work.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        path: Of the submodule; "" is the model.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str = ""


@dataclass(frozen=True)
class Pair:
    """A producer and everything that reads it.

    Attributes:
        producer: Path of the normalization or layer.
        consumers: Path of each layer that reads it -> for each of its input channels the producer's channel.
        channels: How many the producer makes.
        part: Runs the block that holds them, in evaluation.
    """

    producer: str
    consumers: Mapping[str, Tensor]
    channels: int
    part: Call


@dataclass
class Pairs:
    """What was found in a model.

    Attributes:
        found: The pairs, in the order their producers run.
        refused: Producers whose channels reach layers but cannot be scaled there, and normalizations whose channels
            reach none, and why.
    """

    found: list[Pair] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def is_consumer(module: nn.Module) -> bool:
    """Whether it is a layer with a weight per input channel."""
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D"


def is_producer(module: nn.Module) -> bool:
    """Whether it is a layer, or a normalization with a weight per channel."""
    weight = module._parameters.get("weight")
    return is_consumer(module) or (weight is not None and weight.ndim == 1 and "norm" in type(module).__name__.lower())


def channel_axis(module: nn.Module) -> int:
    """Dimension of the channels in what it reads and makes."""
    return 1 if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.modules.batchnorm._NormBase)) else -1


@torch.no_grad()
def find_pairs(model: nn.Module, batch: Any, seed: int = 0) -> Pairs:
    """All producers of a model with their consumers.

    Args:
        model: In float, with values; left as it was.
        batch: A mapping (keyword arguments), tuple or list (positional), one tensor, or ``Inputs``; a few samples are
            enough.
        seed: Of the factors.
    """
    result, draw = Pairs(), torch.Generator().manual_seed(seed)
    with _recorded(model, blocks(model)) as calls, evaluating(model):
        call(model, batch)
    inside = [f"{path}." for path in calls]
    parts = [(path, Call(model.get_submodule(path), *found)) for path, found in calls.items()]
    for path, part in track(parts, "finding pairs of layers"):
        _probe(model, path, part, (), draw, result)
    _probe(model, *whole(model, batch), tuple(inside), draw, result)
    return result


def blocks(model: nn.Module) -> list[str]:
    """Paths of repeated blocks: elements of the outermost lists of modules of one kind, with layers in them."""
    found: list[str] = []
    for path, module in model.named_modules():
        kinds = {type(m) for m in module.children()}
        inner = any(path.startswith(f"{p}.") for p in found)
        if isinstance(module, nn.ModuleList) and len(kinds) == 1 and not inner:
            found += [f"{path}.{i}" for i, m in enumerate(module) if any(is_consumer(c) for c in m.modules())]
    return found


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch of any of the usual forms."""
    part = whole(model, batch)[1]
    return part.module(*part.args, **part.kwargs)


def whole(model: nn.Module, batch: Any) -> tuple[str, Call]:
    """What a batch is for, the model or a submodule, and its call."""
    path, arguments = (batch.path, (batch.args, batch.kwargs)) if isinstance(batch, Inputs) else ("", _arguments(batch))
    return path, Call(model.get_submodule(path), *widened(model, arguments))


def as_batches(given: Any) -> list[Any]:
    """Calibration data as a list; a single batch that is no list or tuple stands for itself.

    Raises:
        ValueError: There is none.
    """
    batches = [given] if isinstance(given, (Mapping, Tensor, Inputs)) else list(given)
    if not batches:
        raise ValueError(explain("batches", "at least one batch", 0, "Pass representative inputs."))
    return batches


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


@contextmanager
def _recorded(model: nn.Module, paths: list[str]) -> Iterator[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of these modules' first calls; without a cache, which a second call would find filled."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            plain = {k: None if hasattr(v, "get_seq_length") else v for k, v in kwargs.items()}
            found.setdefault(path, tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (args, plain)))

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(keep(p), with_kwargs=True) for p in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _probe(
    model: nn.Module, prefix: str, part: Call, skip: tuple[str, ...], draw: torch.Generator, result: Pairs
) -> None:
    head = f"{prefix}." if prefix else ""
    modules = {head + name: m for name, m in part.module.named_modules() if name}
    modules = {path: m for path, m in modules.items() if not path.startswith(skip)} if skip else modules
    layers = {path: m for path, m in modules.items() if is_consumer(m)}
    norms = {path: m for path, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    watched = {**layers, **norms}
    before, order, y = _inputs(part, watched, modules, {}, {})
    *_, same = _inputs(part, watched, modules, {}, {})
    where = prefix or type(model).__name__
    if any(t.isnan().any() for t in y):
        raise ValueError(explain(where, "outputs that are numbers", "NaN", "Look at its weights and at the batch."))
    if not _equal(y, same):
        raise ValueError(explain(where, "the same output twice", "another", "Switch randomness off in evaluation."))
    for path in order:
        if not is_producer(modules[path]):
            continue
        channels = _channels(modules[path])
        exponents = torch.randint(-EXPONENTS, EXPONENTS + 1, (channels,), generator=draw)
        factors = torch.ldexp(torch.ones(channels), exponents)
        consumers: dict[str, Tensor] = {}
        while True:  # a depthwise convolution passes the factors on: what reads it does so only until it is undone
            inverse = {name: 1 / factors[index] for name, index in consumers.items()}
            after, _, undone = _inputs(part, watched, modules, {path: factors}, inverse)
            reached = {
                name: index
                for name, x in before.items()
                if name in layers and name not in (path, *consumers)
                if name in after and not torch.equal(x, after[name])
                if (index := _index(x, after[name], factors.to(x), channel_axis(layers[name]))) is not None
            }
            if not reached:
                break
            first = next(name for name in order if name in reached)
            alike = [n for n in reached if torch.equal(before[n], before[first])]  # they read the same tensor
            consumers |= {name: reached[name] for name in alike}
        if any(n != path and n in after and not torch.equal(before[n], after[n]) for n in norms if n in before):
            # its statistics follow the batches in training, and would take the factors away
            if not is_consumer(modules[path]):
                result.refused[path] = "a batch normalization after it would take factors away in training"
            continue
        if consumers and _equal(y, undone):
            result.found.append(Pair(path, consumers, channels, part))
        elif consumers:
            result.refused[path] = f"something beside {', '.join(consumers)} reads it"
        elif not is_consumer(modules[path]):
            among = "of its block" if prefix else "outside of repeated blocks" if skip else "of the model"
            result.refused[path] = f"no layer {among} reads its channels as they are"


def _inputs(
    part: Call,
    layers: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
    outputs: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[str], list[Tensor]]:
    """Inputs of layers, the order in which modules ran, and the output, with these channels multiplied."""
    found: dict[str, Tensor] = {}
    order: list[str] = []

    def before(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if path not in order:
                order.append(path)
            if path not in layers or not args:
                return None
            found.setdefault(path, args[0].detach().clone())
            if path not in inputs:
                return None
            return (_multiplied(args[0], inputs[path], channel_axis(module)), *args[1:])

        return hook

    def after(path: str) -> Callable[..., Tensor]:
        return lambda module, args, y: _multiplied(y, outputs[path], channel_axis(module))

    handles = [m.register_forward_pre_hook(before(p)) for p, m in modules.items()]
    handles += [modules[p].register_forward_hook(after(p)) for p in outputs]
    try:
        y = part()
    finally:
        for handle in handles:
            handle.remove()
    return found, order, y


def _multiplied(x: Tensor, factors: Tensor, axis: int) -> Tensor:
    shape = [1] * x.ndim
    shape[axis] = len(factors)
    return x * factors.to(x).view(shape)


def _channels(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0])


def _index(before: Tensor, after: Tensor, factors: Tensor, axis: int) -> Tensor | None:
    """For each channel of an input the producer's channel whose factor it was multiplied with; None if there is none.

    Channels are the producer's own, or runs of them repeated as heads are that share keys and values.
    """
    x, z = before.movedim(axis, -1), after.movedim(axis, -1)
    wide, channels = x.shape[-1], len(factors)
    if wide % channels:
        return None
    times = wide // channels
    for size in [channels] if times == 1 else [n for n in range(channels, 0, -1) if channels % n == 0]:
        index = torch.arange(channels).view(-1, 1, size).expand(-1, times, size).reshape(-1)
        if torch.equal(z, x * factors[index]):
            return index
    return None


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
