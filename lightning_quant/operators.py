"""Operands of additions, concatenations and average pools on a grid of their own, as integer-only runtimes need them.

Layers round their inputs, so a value on its way from one layer to the next is an integer wherever it is only moved
(max-pool, reshape, permute, padding) or clipped (ReLU): between a convolution, its folded normalization and its ReLU
nothing is rounded, and what a layer reads is the range after all of them.  Three kinds of operation compute with values
that no layer has rounded: additions and concatenations, whose operands share one range so that integers can be added
and joined as they are, and averages.

Pooling modules change their class in place, as layers do.  Functional operations live in the forward of the module
that writes them: such a module gets a class derived from its own whose forward is its own, traced by ``torch.fx`` with
every child left whole, with calls of the quantizers put in.  That class takes the module apart again when it is
pickled or copied and traces anew, so that nothing but weights has to be stored.

Source: Jacob et al. 2018, arXiv:1712.05877, appendix A.2 and A.3 (additions, concatenations).
**Deviation**: there the operands of an addition may keep scales of their own.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_quant.graph import inherits_forward
from lightning_quant.quantizer import FakeQuantizer

Build = Callable[[str], FakeQuantizer]

ADD: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
JOIN: tuple[Any, ...] = (torch.cat, torch.concat, torch.concatenate)
AVERAGE: tuple[Any, ...] = (torch.mean, "mean", F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
AVERAGE += (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
SIZES = ("size", "dim", "numel", "ndimension", "__len__", "stride")


class QuantPool(nn.Module):
    """An average pool whose input is on a grid."""

    input_quant: FakeQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """As the float module."""
        y: Tensor = super().forward(self.input_quant(input))
        return y


class QuantAvgPool1d(QuantPool, nn.AvgPool1d):
    """``nn.AvgPool1d`` of an input on a grid."""


class QuantAvgPool2d(QuantPool, nn.AvgPool2d):
    """``nn.AvgPool2d`` of an input on a grid."""


class QuantAvgPool3d(QuantPool, nn.AvgPool3d):
    """``nn.AvgPool3d`` of an input on a grid."""


class QuantAdaptiveAvgPool1d(QuantPool, nn.AdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` of an input on a grid."""


class QuantAdaptiveAvgPool2d(QuantPool, nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` of an input on a grid."""


class QuantAdaptiveAvgPool3d(QuantPool, nn.AdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` of an input on a grid."""


POOLS: dict[type[nn.Module], type[QuantPool]] = {
    nn.AvgPool1d: QuantAvgPool1d,
    nn.AvgPool2d: QuantAvgPool2d,
    nn.AvgPool3d: QuantAvgPool3d,
    nn.AdaptiveAvgPool1d: QuantAdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: QuantAdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d: QuantAdaptiveAvgPool3d,
}


class QuantOperators(nn.Module):
    """Mixed into a user's module whose forward adds, joins or averages."""

    born: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The module's own class and its contents; the traced forward is made again from them."""
        return _blank, (self.born,), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take contents over and trace again."""
        self.__dict__.update(state)
        specialize(self, self.born)


def _blank(born: type[nn.Module]) -> nn.Module:
    kind = type(born.__name__, (QuantOperators, born), {"born": born, "__module__": born.__module__})
    return kind.__new__(kind)  # type: ignore[no-any-return,call-overload]


def plan_operators(model: nn.Module) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Find the operands to quantize.

    Returns:
        Path of a module -> names its quantizers will have; and path -> why its forward could not be traced, so that
        what it adds stays in float.
    """
    plans: dict[str, list[str]] = {}
    failures: dict[str, str] = {}
    for path, module in model.named_modules():
        if type(module) in POOLS:
            plans[path] = ["input_quant"]
        elif not inherits_forward(module) and not isinstance(module, FakeQuantizer):
            try:
                names = sorted({name for graph in _graphs(module) for name, _ in _sites(graph)})
            except Exception as error:  # whatever a forward does to a value that stands for a tensor
                if any(True for _ in module.parameters()):  # else a metric or a loss: the model does not run through it
                    failures[path] = f"{type(error).__name__}: {error}"
                continue
            if names:
                plans[path] = names
    return plans, failures


def attach_operators(model: nn.Module, plans: dict[str, list[str]], build: Build) -> None:
    """Give these modules their quantizers and change their classes."""
    for path, names in plans.items():
        module = model.get_submodule(path)
        for name in names:
            module.add_module(name, build(f"{path}.{name}" if path else name))
        if type(module) in POOLS:
            module.__class__ = POOLS[type(module)]
        else:
            specialize(module, type(module))


def detach_operators(model: nn.Module) -> None:
    """Restore the classes and drop the quantizers."""
    for module in list(model.modules()):
        if isinstance(module, QuantPool):
            module.__class__ = next(born for born, kind in POOLS.items() if kind is type(module))  # type: ignore[assignment]
        elif isinstance(module, QuantOperators):
            module.__class__ = module.born  # type: ignore[assignment]
        else:
            continue
        for name in [n for n, child in module.named_children() if isinstance(child, FakeQuantizer)]:
            delattr(module, name)


_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def specialize(module: nn.Module, born: type[nn.Module]) -> None:
    """Give a module that holds its operands' quantizers the class whose forward calls them."""
    module.__class__ = born
    sources = []
    for graph in _graphs(module):
        _insert(graph)
        sources.append(graph.python_code("self"))
    key = (born, "\n".join(code.src for code in sources))
    if key not in _classes:
        functions = []
        for code in sources:
            namespace = dict(code.globals)
            exec(code.src, namespace)  # what torch.fx wrote from the module's own forward
            functions.append(namespace["forward"])
        members = {"born": born, "forward": _either(born, *functions)}
        members |= {"__module__": born.__module__, "__doc__": born.__doc__}
        _classes[key] = type(born.__name__, (QuantOperators, born), members)
    module.__class__ = _classes[key]


def _either(born: type[nn.Module], training: Callable[..., Any], evaluation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(born.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return training(self, *args, **kwargs) if self.training else evaluation(self, *args, **kwargs)

    return forward


class _Shallow(fx.Tracer):
    """Traces one forward and leaves every child whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graphs(module: nn.Module) -> list[fx.Graph]:
    """The module's own forward in training and in evaluation (dropout reads the mode while it is traced)."""
    was, graphs = module.training, []
    try:
        for mode in (True, False):
            module.training = mode
            graphs.append(_traced(module))
    finally:
        module.training = was
    return graphs


def _traced(module: nn.Module) -> fx.Graph:
    """Arguments with defaults keep them, and their names; the traced forward refuses other values."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    graph = _Shallow().trace(
        module, {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    )
    for node, parameter in zip([n for n in graph.nodes if n.op == "placeholder"], parameters, strict=False):
        if parameter.default is not inspect.Parameter.empty:
            node.target = parameter.name  # torch.fx numbers the names of those
    return graph


def _sites(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """Operations whose operands need a grid, with the name of the quantizer of each."""
    numbers = _numbers(graph)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        values = [n for n in node.all_input_nodes if n.op != "get_attr" and n not in numbers]
        both = len(node.args) == 2 and all(n in values for n in node.args)
        if both if node.target in ADD else values and node.target in (*JOIN, *AVERAGE):
            yield f"{node.name}_quant", node


def _numbers(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that stand for sizes, not for tensors."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        shape = (
            node.op == "call_function"
            and node.target is getattr
            and node.args[1] in ("shape", "ndim", "dtype", "device")
        )
        size = node.op == "call_method" and node.target in SIZES
        derived = node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= found
        if shape or size or derived:
            found.add(node)
    return found


def _insert(graph: fx.Graph) -> None:
    """Put calls of the quantizers around the operands."""
    for name, node in list(_sites(graph)):
        numbers = _numbers(graph)
        with graph.inserting_before(node):
            for operand in [n for n in node.all_input_nodes if n.op != "get_attr" and n not in numbers]:
                node.replace_input_with(operand, graph.call_module(name, (operand,)))
        if node.target is operator.iadd:
            node.target = operator.add
        elif node.target == "add_":
            node.target = "add"
    graph.lint()
