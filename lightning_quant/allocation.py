"""Mixed precision: which layer gets which width, so that little is lost within a budget.

    minimize sum of losses[i][c_i]  subject to  sum of costs[i][c_i] <= budget,  one choice c_i per group of layers,
    labels[c_i] = labels[c_j]  for every i, j that are tied

Layers that must be alike in everything (those a runtime fuses into one) are one group, with their losses and costs
added.  Layers that must be alike in one thing (the width of their inputs) are tied: choices that agree in it have one
label.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from lightning_quant.errors import explain

Table = Sequence[Sequence[float]]
Ties = Sequence[Sequence[int]]
ROUNDING = 1e-12  # share of the budget that sums of floats may miss it by
CUTS = 100


def allocate(
    losses: Table, costs: Table, budget: float, ties: Ties = (), labels: Sequence[int] | None = None
) -> list[int]:
    """The exact optimum, by integer linear programming (scipy's ``milp``).

    Args:
        losses: Of each group for each choice; any unit that adds up.
        costs: Of each group for each choice (bits, operations, seconds).
        budget: Largest sum of costs.
        ties: Sets of groups whose choices must have one label.
        labels: Of each choice; None: every choice has its own, so that tied groups choose alike.

    Returns:
        The choice of each group.

    Raises:
        ValueError: Not even the cheapest choices fit.
        ImportError: scipy is missing.

    Source: Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
    Programming", ICML 2021, arXiv:2006.10518, section 3.2; Yao et al., "HAWQ-V3", ICML 2021, arXiv:2011.10680,
    section 3.4.
    """
    problem = _Problem(losses, costs, budget, ties, labels)
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ModuleNotFoundError as error:
        cure = "pip install 'lightning-quant[mixed]', or choose greedily."
        raise ImportError(explain("allocate", "the package scipy", str(error), cure)) from error

    starts = [0]
    for row in losses:
        starts.append(starts[-1] + len(row))
    value = np.array([x for row in losses for x in row], dtype=float)
    cost = np.array([x for row in costs for x in row], dtype=float)
    # numbers of one size, whatever the units; large ones, since the solver stops at an absolute gap
    value = 1e6 * value / max(float(np.abs(value).max()), 1e-300)
    unit = max(float(np.abs(cost).max()), 1e-300)

    def equal(rows: list[dict[int, float]], right: float) -> LinearConstraint:
        entries = [(x, i, j) for i, row in enumerate(rows) for j, x in row.items()]
        x, i, j = zip(*entries, strict=True)
        return LinearConstraint(csr_array((x, (i, j)), shape=(len(rows), len(value))), right, right)

    limits = [equal([dict.fromkeys(range(a, b), 1.0) for a, b in pairwise(starts)], 1)]
    tied = [
        {starts[i] + c: 1.0 for c in problem.of(i, label)} | {starts[j] + c: -1.0 for c in problem.of(j, label)}
        for members in problem.sets
        for i, j in pairwise(members)
        for label in problem.labels_of(members)
    ]
    limits += [equal(tied, 0)] if tied else []
    limits.append(LinearConstraint(cost[None] / unit, -np.inf, budget / unit))
    for _ in range(CUTS):
        found = milp(
            value, integrality=np.ones(len(value)), bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0}
        )
        if found.x is None:
            break
        chosen = [int(np.argmax(found.x[a:b])) for a, b in pairwise(starts)]
        if problem.fits(chosen):
            return chosen
        # within the solver's tolerance of the budget, but above it: this one answer is ruled out
        cut = np.zeros(len(value))
        cut[[start + c for start, c in zip(starts, chosen, strict=False)]] = 1
        limits.append(LinearConstraint(cut[None], -np.inf, len(chosen) - 1))
    raise ValueError(explain("allocate", "a problem that can be solved", found.message, "Raise the budget a little."))


def allocate_greedily(
    losses: Table, costs: Table, budget: float, ties: Ties = (), labels: Sequence[int] | None = None
) -> list[int]:
    """From the cheapest choices on, the step that wins most per cost, as long as it fits; no package needed.

    A step changes one group's choice, or where groups are tied the label of all of them.

    Args:
        losses: See ``allocate``.
        costs: See ``allocate``.
        budget: See ``allocate``.
        ties: See ``allocate``.
        labels: See ``allocate``.

    Returns:
        The choice of each group: within the budget, and no better than ``allocate``'s.

    Raises:
        ValueError: Not even the cheapest choices fit.
    """
    problem = _Problem(losses, costs, budget, ties, labels)
    chosen = problem.cheapest()
    versions = [0] * len(problem.sets)
    steps: list[tuple[float, int, int, dict[int, int]]] = []

    def offer(k: int) -> None:
        for number, step in enumerate(problem.steps(problem.sets[k], chosen)):
            more = sum(costs[i][c] - costs[i][chosen[i]] for i, c in step.items())
            less = sum(losses[i][chosen[i]] - losses[i][c] for i, c in step.items())
            if less > 0:
                rank = -less / more if more > 0 else -math.inf
                heapq.heappush(steps, (rank, k, versions[k] * 10**6 + number, step))

    for k in range(len(problem.sets)):
        offer(k)
    while steps:
        _, k, number, step = heapq.heappop(steps)
        if number // 10**6 != versions[k]:  # a step from where the set no longer is
            continue
        after = [step.get(i, c) for i, c in enumerate(chosen)]
        if problem.fits(after):
            chosen = after
            versions[k] += 1
            offer(k)
    return chosen


class _Problem:
    """Checked tables, and the groups in the sets that choose together: tied ones, all others one by one."""

    def __init__(self, losses: Table, costs: Table, budget: float, ties: Ties, labels: Sequence[int] | None) -> None:
        shapes = [[len(row) for row in table] for table in (losses, costs)]
        if shapes[0] != shapes[1] or not shapes[0] or 0 in shapes[0]:
            got = f"{shapes[0]} losses and {shapes[1]} costs per group"
            raise ValueError(explain("allocate", "a loss and a cost for every choice", got, "Measure all of them."))
        if not all(math.isfinite(x) for table in (losses, costs) for row in table for x in row):
            raise ValueError(explain("allocate", "finite numbers", "others", "Leave out what cannot be measured."))
        self.losses, self.costs, self.budget = losses, costs, budget
        self.labels = list(range(max(shapes[0]))) if labels is None else list(labels)
        self.sets = _joined(len(costs), ties)
        least = self.total(costs, self.cheapest())
        if not self.fits(self.cheapest()):
            cure = "Raise the budget, or add a cheaper choice."
            raise ValueError(explain("allocate", f"a budget of {least:g} or more", f"{budget:g}", cure))

    def fits(self, chosen: Sequence[int]) -> bool:
        """Whether these choices keep the budget."""
        return self.total(self.costs, chosen) <= self.budget + ROUNDING * abs(self.budget)

    @staticmethod
    def total(table: Table, chosen: Sequence[int]) -> float:
        """Sum over groups."""
        return math.fsum(row[c] for row, c in zip(table, chosen, strict=True))

    def of(self, i: int, label: int) -> list[int]:
        """A group's choices of this label."""
        return [c for c in range(len(self.costs[i])) if self.labels[c] == label]

    def labels_of(self, members: Sequence[int]) -> list[int]:
        """Labels that any of these groups has."""
        return sorted({self.labels[c] for i in members for c in range(len(self.costs[i]))})

    def alike(self, members: Sequence[int]) -> Iterator[dict[int, list[int]]]:
        """For each label that all of a set can have, its members' choices; one without ties may choose anything."""
        if len(members) == 1:
            yield {members[0]: list(range(len(self.costs[members[0]])))}
            return
        for label in self.labels_of(members):
            found = {i: self.of(i, label) for i in members}
            if all(found.values()):
                yield found

    def cheapest(self) -> list[int]:
        """The cheapest choices, of those of equal cost the best."""
        chosen = [0] * len(self.costs)
        for members in self.sets:
            ways = [
                {i: min(own, key=lambda c, i=i: (self.costs[i][c], self.losses[i][c])) for i, own in found.items()}  # type: ignore[misc]
                for found in self.alike(members)
            ]
            best = min(ways, key=lambda way: [sum(t[i][c] for i, c in way.items()) for t in (self.costs, self.losses)])
            for i, c in best.items():
                chosen[i] = c
        return chosen

    def steps(self, members: Sequence[int], chosen: Sequence[int]) -> Iterator[dict[int, int]]:
        """Changes to a set that leave it tied."""
        for found in self.alike(members):
            if all(chosen[i] in own for i, own in found.items()):
                yield from ({i: c} for i, own in found.items() for c in own if c != chosen[i])
                continue
            step = {}
            for i, own in found.items():
                as_good = [c for c in own if self.losses[i][c] <= self.losses[i][chosen[i]]]
                by_cost = [(self.costs[i][c], c) for c in as_good]
                step[i] = min(by_cost)[1] if by_cost else min(own, key=lambda c, i=i: self.losses[i][c])  # type: ignore[misc]
            yield step


def _joined(count: int, ties: Ties) -> list[list[int]]:
    """Groups 0 ... count-1 in sets, such that tied ones are in one."""
    of = list(range(count))
    for tie in ties:
        joined = {of[i] for i in tie}
        of = [min(joined) if k in joined else k for k in of]
    sets: dict[int, list[int]] = defaultdict(list)
    for i, k in enumerate(of):
        sets[k].append(i)
    return list(sets.values())
