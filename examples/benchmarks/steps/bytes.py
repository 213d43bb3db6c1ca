"""What fake quantization costs on paper: bytes it moves over memory bandwidth, beside the products of a step.

A pass is one reading or one writing of a tensor with as many elements as the weight or the input.  With kernels in
which everything elementwise is one loop, as compilers make them,

    weight:   forward   2 (read it, write the rounded one)
              backward  3 (read gradient and weight, write the gradient); 0 where the backward is the identity
              again     1 more for the rounded one, which is not kept; 2 where there is nothing to read it with
    input:    forward 2, backward 3, again 2; where its backward is the identity it is kept rounded, 2 and once for all
              layers that read it

and a dynamic range adds one pass over a weight, none over an input, whose rows are still in the cache.  Scales of
groups of n are 1/n of a pass whenever the tensor is read.  What is learned for a group adds (1 + 1 + 7)/n: backward
reads it and writes its gradient; AdamW reads it, its gradient and two moments and writes three of them back.  Theta
with one uint8 per element is read and written in backward; in a pass of its own, its update reads all of it again.  So
with groups of 32, ste takes 2 + 3 + 1 + 2/32 passes over a weight, lsq 6 + 10/32, pege 6 + 19/32.

Without such kernels every operation is a loop of its own: those passes are counted as the operations go by.  What stays
in a cache from one operation to the next is not known here: small tensors cost less than their passes.

A step of plain training is predicted from its products, 2 operations for each multiply-accumulate, forward and twice
backward, and from AdamW, which reads parameter, gradient and two moments and writes three of them (7 passes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_quant import QuantConfig, attach
from lightning_quant.estimators import build_estimator
from lightning_quant.plan import make_plan
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.roofline import count

READ_WRITE, GRADIENT, ADAM, PRODUCTS = 2, 3, 7, 3
ROWS, COLUMNS = 64, 1024  # of the sample whose operations are counted


@dataclass(frozen=True)
class Passes:
    """Passes over one tensor in a step.

    Attributes:
        forward: Of rounding it.
        backward: Of its gradient, with the update of what it learns.
        again: Of rounding it once more in backward.
        keeps: Whether backward reads the tensor itself.
    """

    forward: float
    backward: float
    again: float
    keeps: bool


@dataclass(frozen=True)
class Survey:
    """What a step of a model has to do.

    Attributes:
        macs: Multiply-accumulates of a forward pass.
        parameters: Trained ones.
        weights: Elements of quantized weights.
        inputs: Elements of their layers' inputs, one that several layers read counted once.
        read: The same, counted for each layer.
    """

    macs: int
    parameters: int
    weights: int
    inputs: int
    read: int


def survey(build: Callable[[], nn.Module], inputs: Mapping[str, Tensor], config: QuantConfig) -> Survey:
    """Count a model's work from shapes alone.

    Args:
        build: Makes the float model; called on the meta device.
        inputs: Arguments of its forward.
        config: What is quantized.
    """
    with torch.device("meta"):
        model = build()
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0]))
        for path, module in model.named_modules()
        if "weight" in module._parameters
    ]
    given: dict[str, Any] = {name: tensor.to("meta") for name, tensor in inputs.items() if name != "labels"}
    if "input_ids" in given:
        given["use_cache"] = True  # without a cache, transformers looks for packed sequences, which asks for values
    macs = count(model, given).macs
    for hook in hooks:
        hook.remove()
    parameters = sum(p.numel() for p in model.parameters())
    layers = make_plan(model, config, build_estimator(config.method, dict(config.options)), values=False).layers
    own = [seen[layer.path] for layer in layers if layer.activation is not None]
    distinct = {id(x): x.numel() for x in own}  # ``seen`` keeps them, so that identities stay their own
    weights = sum(math.prod(layer.shape) for layer in layers)
    return Survey(macs, parameters, weights, sum(distinct.values()), sum(x.numel() for x in own))


def passes(
    config: QuantConfig, fused: bool = True, change: Callable[[nn.Module], None] | None = None, in_passing: bool = True
) -> tuple[Passes, Passes | None]:
    """Passes over a weight and over an input (None: float) in float32.

    Args:
        config: Method, scheme and options.
        fused: The arithmetic is one loop each way (the module's formula); False: one loop for each operation.
        change: Changes a model with quantizers, of which one layer is looked at.
        in_passing: Dynamic ranges are found as the formula says, and not by operations of their own.
    """
    layer = _sample(config, change)
    own: FakeQuantizer = layer.weight_quant
    of_input: FakeQuantizer | None = layer.input_quant
    x = torch.ones(ROWS, COLUMNS)
    if fused:
        together = 1 if _looks(own) else None
        first = _fused(own, layer.weight.detach(), together, 1 if in_passing else None)
        return first, None if of_input is None else _fused(of_input, x, None, 0 if in_passing else None)
    whole = _counted(layer)
    if of_input is None:
        return Passes(*whole, _looks(own)), None
    alone = _counted(_sample(replace(config, activation=None), change))
    rest = (both - weight for both, weight in zip(whole, alone, strict=True))
    return Passes(*alone, _looks(own)), Passes(*rest, _looks(of_input))


def _sample(config: QuantConfig, change: Callable[[nn.Module], None] | None) -> Any:
    """A quantized layer whose weight has as many elements as an input of ``ROWS``, its ranges set."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False))
    attach(model, replace(config, compile=False))
    if change is not None:
        change(model)
    layer: Any = model[0]
    if layer.input_quant is not None and not layer.input_quant.ready:
        layer.input_quant.set_range(-torch.ones(1), torch.ones(1))
    return layer


def _looks(q: FakeQuantizer) -> bool:
    """Whether the backward pass reads what was rounded."""
    return q.clips or q.estimator.needs_bins or bool(_learned(q))


def _learned(q: FakeQuantizer) -> list[nn.Parameter]:
    return [p for p in q.parameters() if p.requires_grad]


def _fused(q: FakeQuantizer, x: Tensor, again: float | None, first: float | None) -> Passes:
    """The module's formula, with what it depends on read off the quantizer; ``first``: passes that find a range."""
    learned, looks = _learned(q), _looks(q)
    shared = sum(p.numel() for p in learned) / x.numel()
    scales = 0.0 if q.spec.dynamic else q.scale.numel() / x.numel()
    of_scales = 0.0 if any(p is q._parameters.get("scale") for p in learned) else scales
    backward = (GRADIENT + of_scales) * looks + shared * (1 + 1 + ADAM)
    if q.estimator.holds_elements:
        backward += 3 / x.element_size() + 2 * (q.turn is None)  # see ``FakeQuantizer.track_turn``
    forward = READ_WRITE + scales
    found = ranging(q, x) if first is None or not q.spec.dynamic else first
    return Passes(forward + found, backward, forward if again is None else again, looks)


def ranging(q: FakeQuantizer, x: Tensor) -> float:
    """Passes of the operations that find a tensor's range before it can be rounded; 0 where the range is kept."""
    if not q.spec.dynamic:
        return 0.0
    with _Moved() as moved:
        q.scale_zero_offset(x)
    return moved.bytes / (x.numel() * x.element_size())


def _counted(layer: Any) -> tuple[float, float, float]:
    """Forward, backward and again of all operations but products that a call of a layer makes, as they go by."""
    x, size = torch.randn(ROWS, COLUMNS, requires_grad=True), ROWS * COLUMNS * 4
    learned = [p for q in (layer.weight_quant, layer.input_quant) if q is not None for p in _learned(q)]
    found = {}
    for layer.recomputes in (False, True):
        with _Moved() as forward:
            y = layer(x)
        gradient = torch.ones_like(y)
        with _Moved() as backward:
            torch.autograd.grad(y, [x, layer.weight, *learned], gradient, allow_unused=True)
        found[layer.recomputes] = forward.bytes / size, backward.bytes / size
    theirs = sum(p.numel() for p in learned) * 4 * ADAM / size
    return found[False][0], found[False][1] + theirs, found[True][1] - found[False][1]


class _Moved(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations but products read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        same = {t.untyped_storage().data_ptr() for t in read.values()}
        view = all(t.untyped_storage().data_ptr() in same for t in written) and not func._schema.is_mutable
        if not view and "empty" not in func.__name__ and func._overloadpacket not in flop_registry:
            self.bytes += sum(t.numel() * t.element_size() for t in (*read.values(), *written))
        return out


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step that are ours.

    Attributes:
        moved: Read and written by quantizers.
        kept: From forward to backward, beside what plain training keeps.
    """

    moved: float
    kept: float


def traffic(
    found: Survey,
    each: tuple[Passes, Passes | None],
    width: int = 4,
    recompute: bool = True,
    sharing: bool = True,
) -> Traffic:
    """Bytes that fake quantization moves and keeps in a step.

    Args:
        found: The model's work.
        each: Passes over weights and inputs.
        width: Bytes of an element.
        recompute: What backward needs in rounded form is rounded once more instead of kept.
        sharing: Layers that read the same input round it once; only where its backward is the identity.
    """
    weight, given = each
    moved = found.weights * (weight.forward + weight.backward + weight.again * recompute)
    kept = 0 if recompute else found.weights
    if given is not None and given.keeps:
        moved += found.read * (given.forward + given.backward + given.again * recompute)
        kept += 0 if recompute else found.read
    elif given is not None:
        elements = found.inputs if sharing else found.read
        moved += elements * (given.forward + given.backward)
        kept += elements - found.inputs  # plain training keeps the float ones, once for all of their readers
    return Traffic(moved * width, kept * width)


def plain_seconds(found: Survey, bandwidth: float, rate: float, width: int = 4) -> float:
    """A step of plain training: see the module.

    Args:
        found: The model's work.
        bandwidth: Bytes per second.
        rate: Operations of matrix products per second.
        width: Bytes of an element.
    """
    return 2 * PRODUCTS * found.macs / rate + ADAM * width * found.parameters / bandwidth
