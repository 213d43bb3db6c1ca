"""Who feeds whom, read off a model with ``torch.fx``: what follows which layer, which layers are outermost.

Models that trace only in parts are read in parts: the largest submodules that do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import fx, nn

Wanted = Callable[[nn.Module], bool]


@dataclass
class Flow:
    """What was found.

    Attributes:
        parts: Path of each traced part ("" is the model) and its graph.
        failures: Path and reason of what did not trace although it has a forward.
    """

    parts: dict[str, fx.Graph] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def flow(model: nn.Module) -> Flow:
    """Trace the model, or else the largest submodules that can be; nothing is run and nothing changes."""
    found = Flow()
    _trace(model, "", found)
    return found


def _trace(module: nn.Module, path: str, found: Flow) -> None:
    if not any(True for _ in module.children()):
        return
    if isinstance(module, nn.Sequential) or not inherits_forward(module):
        try:
            found.parts[path] = fx.Tracer().trace(module)
            return
        except Exception as error:  # whatever a forward does to a value that stands for a tensor
            found.failures[path] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for name, child in module.named_children():
        _trace(child, f"{path}.{name}" if path else name, found)


def inherits_forward(module: nn.Module) -> bool:
    """Whether its forward is a framework's: PyTorch's own modules, containers, a LightningModule with steps only."""
    return type(module).forward.__module__.split(".")[0] in ("torch", "lightning", "pytorch_lightning")


def followers(model: nn.Module, found: Flow, layer: Wanted, after: Wanted) -> dict[str, str]:
    """Pairs (layer, the module right after it) where nothing else sees what lies between.

    Args:
        model: The traced model.
        found: Its ``flow``.
        layer: Which modules may come first.
        after: Which modules may follow.

    Returns:
        Path of the first -> path of the second; modules that run more than once are left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[path]) for path, _ in _calls(found))
    pairs = {}
    for path, node in _calls(found):
        source = node.args[0] if node.args else None
        if not after(modules[path]) or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        prefix = path[: len(path) - len(str(node.target))]
        first = prefix + str(source.target)
        once = calls[id(modules[path])] == calls[id(modules[first])] == 1
        if once and len(source.users) == 1 and layer(modules[first]):
            pairs[first] = path
    return pairs


def outermost(found: Flow, wanted: set[str]) -> tuple[set[str], set[str]] | None:
    """Paths among ``wanted`` with none of them before, and with none of them after, on the way through the model.

    Returns:
        (first, last), or None where the model did not trace in one part that holds them all.
    """
    for prefix, graph in found.parts.items():
        head = f"{prefix}." if prefix else ""
        here = {
            n: head + str(n.target) for n in graph.nodes if n.op == "call_module" and head + str(n.target) in wanted
        }
        if set(here.values()) != wanted:
            continue
        seen: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            seen[node] = any(seen[n] or n in here for n in node.all_input_nodes)
        ahead: dict[fx.Node, bool] = {}
        for node in reversed(graph.nodes):
            ahead[node] = any(ahead[n] or n in here for n in node.users)
        first = {path for node, path in here.items() if not seen[node]}
        return first, {path for node, path in here.items() if not ahead[node]}
    return None


def _calls(found: Flow) -> Iterator[tuple[str, fx.Node]]:
    """Every call of a module, with its path in the model."""
    for prefix, graph in found.parts.items():
        head = f"{prefix}." if prefix else ""
        for node in graph.nodes:
            if node.op == "call_module":
                yield head + str(node.target), node
