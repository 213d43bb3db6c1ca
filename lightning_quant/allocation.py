"""Mixed precision: which layer gets which width, so that little is lost within a budget.

    minimize sum of losses[i][c_i]  subject to  sum of costs[i][c_i] <= budget,  one choice c_i per group of layers

Layers that must be alike (those a runtime fuses into one) are one group, with their losses and costs added.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lightning_quant.errors import explain

Table = Sequence[Sequence[float]]


def allocate(losses: Table, costs: Table, budget: float) -> list[int]:
    """The exact optimum, by integer linear programming.

    Args:
        losses: Of each group for each choice; any unit that adds up.
        costs: Of each group for each choice (bits, operations, seconds).
        budget: Largest sum of costs.

    Returns:
        The choice of each group.

    Raises:
        ValueError: Not even the cheapest choices fit.

    Source: Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer
    Programming", ICML 2021, arXiv:2006.10518, section 3.2.
    """
    _check(losses, costs, budget)
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    sizes = [len(row) for row in losses]
    count = sum(sizes)
    value = np.array([x for row in losses for x in row], dtype=float)
    cost = np.array([x for row in costs for x in row], dtype=float)
    one = lil_array((len(sizes), count))
    start = 0
    for i, size in enumerate(sizes):
        one[i, start : start + size] = 1
        start += size
    # numbers of one size, whatever the units; large ones, since the solver stops at an absolute gap
    value = 1e6 * value / max(float(np.abs(value).max()), 1e-300)
    unit = max(float(cost.max()), 1e-300)
    limits = [LinearConstraint(one.tocsr(), 1, 1), LinearConstraint(cost[None] / unit, -np.inf, budget / unit)]
    found = milp(value, integrality=np.ones(count), bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0})
    if found.x is None:
        raise ValueError(explain("allocate", "a problem that can be solved", found.message, "Raise the budget."))
    chosen, start = [], 0
    for size in sizes:
        chosen.append(int(np.argmax(found.x[start : start + size])))
        start += size
    return chosen


def allocate_greedily(losses: Table, costs: Table, budget: float) -> list[int]:
    """From the cheapest choices on, the step that wins most per cost, as long as it fits; no package needed.

    Args:
        losses: See ``allocate``.
        costs: See ``allocate``.
        budget: See ``allocate``.
    """
    _check(losses, costs, budget)
    ranked = [sorted(zip(row, losses[i], range(len(row)), strict=True)) for i, row in enumerate(costs)]
    chosen = [row[0][2] for row in ranked]
    spent = sum(row[0][0] for row in ranked)
    steps: list[tuple[float, int, int, int]] = []

    def offer(i: int) -> None:
        now = chosen[i]
        for c, loss in enumerate(losses[i]):
            more, less = costs[i][c] - costs[i][now], losses[i][now] - loss
            if less > 0:
                heapq.heappush(steps, (-less / more if more > 0 else -float("inf"), i, now, c))

    for i in range(len(chosen)):
        offer(i)
    while steps:
        _, i, before, c = heapq.heappop(steps)
        if chosen[i] != before:  # a step from where the group no longer is
            continue
        after = spent + costs[i][c] - costs[i][before]
        if after <= budget:
            chosen[i], spent = c, after
            offer(i)
    return chosen


def _check(losses: Table, costs: Table, budget: float) -> None:
    shapes = [[len(row) for row in table] for table in (losses, costs)]
    if shapes[0] != shapes[1] or not shapes[0] or 0 in shapes[0]:
        got = f"{shapes[0]} losses and {shapes[1]} costs per group"
        raise ValueError(explain("allocate", "a loss and a cost for every choice", got, "Measure all of them."))
    least = sum(min(row) for row in costs)
    if least > budget:
        cure = "Raise the budget, or add a cheaper choice."
        raise ValueError(explain("allocate", f"a budget of {least:g} or more", f"{budget:g}", cure))
