"""Which layers bear few bits: each layer quantized alone, at each width, beside the float model.

    losses[i][c] = metric(model with only layer i quantized by scheme c) - metric(float model)

``loss`` needs labels in the batches, ``kl`` and ``mse`` compare outputs with the float model's and need none.  The
result says what a layer costs, ``recipe`` chooses widths under a budget (``lightning_quant.allocation``) and returns
the rules that a config takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_quant.allocation import allocate, allocate_greedily
from lightning_quant.attach import attach, detach, quant_layers, quantizers
from lightning_quant.bypass import evaluating
from lightning_quant.calibration import calibrate
from lightning_quant.errors import explain, unknown
from lightning_quant.fused import fused_layers
from lightning_quant.progress import track
from lightning_quant.spec import LayerRule, QuantConfig, parse_scheme

METRICS = ("loss", "kl", "mse")


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        schemes: The schemes tried, weights' part.
        groups: Paths of layers that are chosen for together; most hold one.
        losses: By how much the metric rises for each group and scheme.
        bits: Stored bits for each group and scheme: codes and scales.
        numbers: Weights of each group.
        baseline: The float model's metric.
        metric: Its name.
    """

    schemes: tuple[str, ...]
    groups: list[tuple[str, ...]]
    losses: list[list[float]]
    bits: list[list[float]]
    numbers: list[int]
    baseline: float
    metric: str

    def recipe(self, bits: float, exact: bool = True) -> tuple[LayerRule, ...]:
        """Rules with which the weights take so many bits each on average, at the least sum of losses.

        Args:
            bits: Stored bits per weight, scales included.
            exact: By integer programming (scipy); else greedily.

        Raises:
            ValueError: Fewer bits than the cheapest scheme needs.
        """
        choose = allocate if exact else allocate_greedily
        chosen = choose(self.losses, self.bits, bits * sum(self.numbers))
        pairs = zip(self.groups, chosen, strict=True)
        return tuple(LayerRule(path, parse_scheme(self.schemes[c])[0]) for paths, c in pairs for path in paths)

    def choice(self, rule: LayerRule) -> int:
        """Which of ``schemes`` a rule of a recipe stands for."""
        wanted: list[object] = [parse_scheme(name)[0] for name in self.schemes]
        return wanted.index(rule.weight)

    def stored(self, rules: Iterable[LayerRule]) -> float:
        """Bits per weight of such rules."""
        chosen = {rule.match: self.choice(rule) for rule in rules}
        total: float = sum(row[chosen[group[0]]] for group, row in zip(self.groups, self.bits, strict=True))
        return total / sum(self.numbers)

    def __str__(self) -> str:
        """A table, the most sensitive group at its narrowest first."""
        names = [", ".join(group) for group in self.groups]
        wide = max(map(len, names))
        lines = [f"{'layer':<{wide}}  " + "  ".join(f"{s:>10}" for s in self.schemes)]
        order = sorted(range(len(names)), key=lambda i: -max(self.losses[i]))
        lines += [f"{names[i]:<{wide}}  " + "  ".join(f"{x:>10.3g}" for x in self.losses[i]) for i in order]
        return "\n".join([*lines, f"{self.metric} above the float model's, {self.baseline:.4f}"])

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**vars(self), "schemes": list(self.schemes), "groups": [list(g) for g in self.groups]}


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    schemes: Sequence[str] = ("w2a16-g32", "w3a16-g32", "w4a16-g32", "w8a16"),
    metric: str = "kl",
    config: QuantConfig | None = None,
) -> Sensitivity:
    """Quantize one layer at a time and look at the output.

    Args:
        model: In float; it is left as it was.
        batches: Data, each a mapping, tuple, list or tensor; with ``loss`` mappings with ``labels``.
        schemes: What is tried on every layer; all with float activations, or each with its own.
        metric: ``loss``, ``kl`` (divergence from the float model's outputs, over the last dimension) or ``mse``.
        config: Rules, target and so on; its scheme is replaced by each of ``schemes``.

    Raises:
        ValueError: Unknown metric, no batch or no scheme.
    """
    from lightning_quant.transforms.pairs import call

    data = list(batches)
    if metric not in METRICS:
        raise ValueError(unknown("metric", metric, METRICS, "sensitivity"))
    if not data or not schemes:
        got = f"{len(data)} batches, {len(schemes)} schemes"
        raise ValueError(explain("sensitivity", "a batch and a scheme at least", got, "Pass representative inputs."))
    config = config or QuantConfig("ste")
    training = model.training
    losses: dict[tuple[str, ...], list[float]] = {}
    bits: dict[tuple[str, ...], list[float]] = {}
    numbers: dict[tuple[str, ...], int] = {}
    with evaluating(model):
        measure = _measure(metric, [_output(call(model, batch), metric) for batch in data])
        baseline = measure(lambda i: call(model, data[i]))
        for scheme in schemes:
            attach(model, _with_scheme(config, scheme))
            try:
                if any(not q.ready for _, q in quantizers(model)):
                    calibrate(model, data)
                layers = dict(quant_layers(model))
                groups = _groups(model, list(layers), config.target)
                everything = list(quantizers(model))
                for _, q in everything:
                    q.enabled = False
                for group in track(groups, f"{scheme}, layer by layer"):
                    own = [q for path in group for _, q in quantizers(layers[path])]
                    for q in own:
                        q.enabled = True
                    losses.setdefault(group, []).append(measure(lambda i: call(model, data[i])) - baseline)
                    for q in own:
                        q.enabled = False
                    bits.setdefault(group, []).append(sum(_bits(layers[path]) for path in group))
                    numbers[group] = sum(layers[path].weight.numel() for path in group)
            finally:
                detach(model, fold=False)
    model.train(training)
    found = list(losses)
    table = [losses[g] for g in found], [bits[g] for g in found], [numbers[g] for g in found]
    return Sensitivity(tuple(schemes), found, *table, baseline, metric)


def _with_scheme(config: QuantConfig, scheme: str) -> QuantConfig:
    weight, activation = parse_scheme(scheme)
    return QuantConfig.from_dict({**config.to_dict(), "weight": None, "activation": None} | _specs(weight, activation))


def _specs(weight: Any, activation: Any) -> dict[str, Any]:
    return {"weight": weight and dict(vars(weight)), "activation": activation and dict(vars(activation))}


def _groups(model: nn.Module, paths: list[str], target: str) -> list[tuple[str, ...]]:
    """Layers that the runtime fuses together, the others one by one."""
    fused = [tuple(p for p in group if p in paths) for group in fused_layers(model, target)]
    of = {path: group for group in fused for path in group}
    return list(dict.fromkeys(of.get(path, (path,)) for path in paths))


def _bits(layer: Any) -> float:
    """Bits of a layer's codes and of their scales in 16 bits each."""
    q = layer.weight_quant
    scales = 1
    for size in q.scale_shape:
        scales *= size
    return float(layer.weight.numel() * q.spec.bits + 16 * scales)


def _output(output: Any, metric: str) -> Tensor:
    if metric == "loss":
        loss = output.get("loss")
        if loss is None:
            cure = "Put labels into the batches, or use metric='kl'."
            raise ValueError(explain("sensitivity(metric='loss')", "a model that returns its loss", "none", cure))
        value: Tensor = loss
        return value
    first = output if isinstance(output, Tensor) else output["logits"] if "logits" in output else output[0]
    return first.float()


def _measure(metric: str, floats: list[Tensor]) -> Callable[[Callable[[int], Any]], float]:
    """Mean of the metric over batches, given what runs a batch."""

    def value(i: int, output: Any) -> Tensor:
        found = _output(output, metric)
        if metric == "loss":
            return found
        if metric == "mse":
            return (found - floats[i]).square().mean()
        rows, wanted = found.flatten(0, -2).log_softmax(-1), floats[i].flatten(0, -2).log_softmax(-1)
        return F.kl_div(rows, wanted, reduction="batchmean", log_target=True)

    def run(forward: Callable[[int], Any]) -> float:
        return float(torch.stack([value(i, forward(i)) for i in range(len(floats))]).mean())

    return run
