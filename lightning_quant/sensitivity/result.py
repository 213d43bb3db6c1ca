"""What was measured, and the widths chosen from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_quant.allocation import allocate, allocate_greedily
from lightning_quant.errors import explain
from lightning_quant.scheme import TensorSpec, parse_scheme
from lightning_quant.sensitivity.budgets import Budget, describe
from lightning_quant.spec import INHERIT, LayerRule, QuantConfig

SOLVERS = ("exact", "greedy")
UNITS = {
    "kl": "divergence from the float model",
    "mse": "squared difference from the float model's output",
    "loss": "rise of the loss",
    "sqnr": "noise over signal of the layer's output",
    "hessian": "mean diagonal of the Hessian times squared error of the weight",
}


@dataclass(frozen=True)
class Recipe:
    """Widths chosen within a budget.

    Attributes:
        schemes: Of each layer, by path.
        rules: The same as a ``QuantConfig`` takes them, to go before other rules.
        loss: Sum of the measure's losses.
        costs: What it takes: ``bits`` per weight of these layers, ``bytes`` and ``bops`` of the whole model, and
            ``seconds`` of these layers where latency was asked for.
        budget: What was allowed.
        gap: By what share of the exact optimum's loss the greedy choice is worse; None where it was not compared.
    """

    schemes: dict[str, str]
    rules: tuple[LayerRule, ...]
    loss: float
    costs: dict[str, float]
    budget: Budget
    gap: float | None

    def config(self, base: QuantConfig) -> QuantConfig:
        """A config with these rules before its own; what they do not name gets the scheme that most layers got.

        Args:
            base: Method, target and everything else.
        """
        counts = Counter(self.schemes.values()).most_common()
        usual = [name for name, _ in counts if parse_scheme(name)[0] is not None]
        rounding = [name for name in usual if parse_scheme(name)[1] is not None]  # operators need inputs with a width
        weight, activation = parse_scheme((rounding if base.operators and rounding else usual)[0])
        plain = base.to_dict() | {"weight": None, "activation": None}
        specs = {"weight": weight and asdict(weight), "activation": activation and asdict(activation)}
        rules = [*(asdict(rule) for rule in self.rules), *plain["rules"]]
        return QuantConfig.from_dict({**plain, **specs, "rules": rules})

    def __str__(self) -> str:
        """The widths, and what they cost."""
        wide = max(map(len, self.schemes))
        lines = [f"{path:<{wide}}  {scheme}" for path, scheme in self.schemes.items()]
        lines.append(
            f"{', '.join(describe(kind, value) for kind, value in self.costs.items())} (budget: {self.budget})"
        )
        lines.append(f"sum of losses {self.loss:.4g}")
        if self.gap is not None:
            lines[-1] += f"; chosen greedily it would be {self.gap:.2%} more"
        return "\n".join(lines)


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        schemes: The schemes tried.
        groups: Paths of layers that are chosen for together, since a runtime makes one of them; most hold one.
        losses: Of each group under each scheme: see ``lightning_quant.sensitivity.measures``.
        bits: Stored bits, likewise.
        bops: Bit operations per sample, likewise.
        seconds: Latency, likewise; None where it was not asked for.
        numbers: Weights of each group.
        ties: Sets of groups whose inputs must have one width.
        rest: ``bytes`` and ``bops`` of everything else.
        baseline: The float model's figure, with the measures that have one.
        measure: Its name.
        patterns: What rules match each layer by.
        activations: Inputs that a rule of the config speaks of, which new rules leave to it.
        details: By layer, what the measure was made of: with ``sqnr`` decibels of weight, input and output under each
            scheme, with ``hessian`` the mean diagonal (``trace``), its standard error (``spread``) and each scheme's
            squared ``error``.
    """

    schemes: tuple[str, ...]
    groups: list[tuple[str, ...]]
    losses: list[list[float]]
    bits: list[list[float]]
    bops: list[list[float]]
    seconds: list[list[float]] | None
    numbers: list[int]
    ties: list[list[int]]
    rest: dict[str, float]
    baseline: float
    measure: str
    patterns: dict[str, str]
    activations: dict[str, TensorSpec | None]
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def recipe(self, budget: Budget | str | float, solver: str = "exact") -> Recipe:
        """Widths with the least sum of losses within a budget.

        Args:
            budget: Such as ``4.5bits`` or a bare number (stored bits per weight of these layers, scales included),
                ``120MiB`` (the whole model, other tensors in the dtype they have), ``12GBOPs`` (the whole model's bit
                operations per sample) or ``3ms`` (these layers together).
            solver: ``exact``, by integer programming (scipy), or ``greedy``.

        Raises:
            ValueError: No budget that can be read, or one that the cheapest widths do not keep.
            ImportError: ``exact`` without scipy.
        """
        limit = Budget.parse(budget)
        table, most = self._costs(limit)
        ties = (self.ties, self._labels())
        choices = {}
        if solver not in SOLVERS:
            raise ValueError(explain("solver", f"one of {', '.join(SOLVERS)}", repr(solver), "Leave it out."))
        for name, choose in (("greedy", allocate_greedily), ("exact", allocate)):
            if name == solver or solver == "exact":
                choices[name] = choose(self.losses, table, most, *ties)
        sums = {name: self._sum(self.losses, chosen) for name, chosen in choices.items()}
        gap = None
        if solver == "exact":
            gap = (sums["greedy"] - sums["exact"]) / abs(sums["exact"]) if sums["exact"] else 0.0
        chosen = choices[solver]
        schemes = {p: self.schemes[c] for group, c in zip(self.groups, chosen, strict=True) for p in group}
        rules = tuple(self._rule(path, scheme) for path, scheme in schemes.items())
        return Recipe(schemes, rules, sums[solver], self.costs(chosen), limit, gap)

    def costs(self, chosen: Sequence[int]) -> dict[str, float]:
        """What widths cost, as ``Recipe.costs``; one choice per group, a place in ``schemes``."""
        bits = self._sum(self.bits, chosen)
        found = {
            "bits": bits / sum(self.numbers),
            "bytes": bits / 8 + self.rest["bytes"],
            "bops": self._sum(self.bops, chosen) + self.rest["bops"],
        }
        return found if self.seconds is None else {**found, "seconds": self._sum(self.seconds, chosen)}

    def _costs(self, budget: Budget) -> tuple[list[list[float]], float]:
        """The table that a budget speaks of, and how much of it may be spent."""
        if budget.kind == "seconds" and self.seconds is None:
            cure = "Pass --latency FILE or --latency measure (latency= in Python)."
            raise ValueError(explain(f"budget {budget}", "the layers' latencies", "none", cure))
        table = {"bytes": self.bits, "seconds": self.seconds}.get(budget.kind) or getattr(self, budget.kind)
        taken = {"bytes": self.rest["bytes"] * 8, "bops": self.rest["bops"]}.get(budget.kind, 0.0)
        most = budget.value * {"bits": sum(self.numbers), "bytes": 8}.get(budget.kind, 1) - taken
        least = self.costs([min(range(len(row)), key=row.__getitem__) for row in table])[budget.kind]
        if budget.value < least * (1 - 1e-12):
            fixed = describe(budget.kind, self.rest[budget.kind]) if budget.kind in self.rest else ""
            least_words = describe(budget.kind, least) + (
                f" ({fixed} of it in what is not chosen for)" if fixed else ""
            )
            cure = "Raise the budget, or add a cheaper scheme."
            raise ValueError(explain("budget", f"{least_words} or more", str(budget), cure))
        return table, most

    def _labels(self) -> list[int]:
        """Schemes that round inputs alike have one label."""
        kinds = [parse_scheme(name)[1] for name in self.schemes]
        return [kinds.index(kind) for kind in kinds]

    def _rule(self, path: str, scheme: str) -> LayerRule:
        weight, activation = parse_scheme(scheme)
        if path in self.activations:  # a rule of the user's speaks of them
            activation = self.activations[path]
        elif len(set(self._labels())) == 1:
            return LayerRule(self.patterns[path], weight, INHERIT)
        return LayerRule(self.patterns[path], weight, activation)

    @staticmethod
    def _sum(table: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
        return math.fsum(row[c] for row, c in zip(table, chosen, strict=True))

    def __str__(self) -> str:
        """A table, the most sensitive group first."""
        names = [", ".join(group) for group in self.groups]
        wide = max(map(len, [*names, "layer"]))
        order = sorted(range(len(names)), key=lambda i: -max(self.losses[i]))
        lines = [f"{'layer':<{wide}}  " + "  ".join(f"{s:>12}" for s in self.schemes)]
        lines += [f"{names[i]:<{wide}}  " + "  ".join(f"{x:>12.3g}" for x in self.losses[i]) for i in order]
        lines.append(UNITS[self.measure] + (f", {self.baseline:.4f}" if self.measure == "loss" else ""))
        if self.measure == "sqnr":
            lines.append("signal to noise of weight / input / output, dB:")
            for path in (p for i in order for p in self.groups[i]):
                rows = zip(*(self.details[path][name] for name in ("weight", "input", "output")), strict=True)
                lines.append(f"{path:<{wide}}  " + "  ".join(f"{a:.1f}/{b:.1f}/{c:.1f}" for a, b, c in rows))
        if self.measure == "hessian":
            lines.append("mean diagonal of the Hessian, and its standard error:")
            for path in (p for i in order for p in self.groups[i]):
                lines.append(f"{path:<{wide}}  {self.details[path]['trace']:.3g} +- {self.details[path]['spread']:.1g}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; infinite decibels (nothing is rounded) are None."""
        plain = {**vars(self), "schemes": list(self.schemes), "groups": [list(g) for g in self.groups]}
        plain["details"] = {
            path: {k: [None if x == math.inf else x for x in v] if isinstance(v, list) else v for k, v in row.items()}
            for path, row in self.details.items()
        }
        return {k: v for k, v in plain.items() if k not in ("patterns", "activations")}
