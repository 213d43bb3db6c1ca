"""Mixed precision's choices: the exact one is brute force's, the greedy one keeps the budget and is never better."""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_quant.allocation import allocate, allocate_greedily


def problem(seed: int, groups: int, choices: int) -> tuple[list[list[float]], list[list[float]], float]:
    draw = random.Random(seed)
    losses = [sorted((draw.random() * 10**i for _ in range(choices)), reverse=True) for i in range(groups)]
    costs = [[size * bits for bits in range(2, 2 + choices)] for size in (draw.randint(1, 50) for _ in range(groups))]
    least, most = sum(c[0] for c in costs), sum(c[-1] for c in costs)
    return losses, costs, least + (most - least) * draw.random()


def total(table, chosen) -> float:
    return math.fsum(row[c] for row, c in zip(table, chosen, strict=True))


def allowed(costs, budget, ties, labels):
    """Every way to choose that keeps the budget and the ties, one by one."""
    for chosen in itertools.product(*(range(len(row)) for row in costs)):
        tied = all(len({labels[chosen[i]] for i in tie}) == 1 for tie in ties)
        if tied and total(costs, chosen) <= budget * (1 + 1e-12):
            yield list(chosen)


number = st.floats(0, 1, allow_subnormal=False)


@st.composite
def problems(draw):
    """Any losses and costs, not only falling and rising ones; ties that may overlap; labels that several share."""
    groups, choices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    table = st.lists(st.lists(number, min_size=choices, max_size=choices), min_size=groups, max_size=groups)
    tie = st.lists(st.integers(0, groups - 1), min_size=2, max_size=3)
    ties = draw(st.lists(tie, max_size=2))
    labels = draw(st.lists(st.integers(0, 2), min_size=choices, max_size=choices))
    losses, costs = draw(table), draw(table)
    share = draw(number)
    sums = [total(costs, c) for c in allowed(costs, math.inf, ties, labels)]
    return losses, costs, min(sums) + share * (max(sums) - min(sums)), ties, labels


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_exact_choice_is_brute_forces_and_the_greedy_one_is_no_better(case):
    losses, _, _, _, _ = case
    every = list(allowed(*case[1:]))
    best = min(total(losses, c) for c in every)
    exact, greedy = allocate(*case), allocate_greedily(*case)
    assert exact in every
    assert greedy in every
    assert total(losses, exact) == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert total(losses, greedy) >= best - 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_losses_of_very_different_sizes(seed):
    losses, costs, budget = problem(seed, groups=6, choices=3)
    best = min(total(losses, c) for c in allowed(costs, budget, (), range(3)))
    chosen = allocate(losses, costs, budget)
    assert total(losses, chosen) == pytest.approx(best, rel=1e-9)
    assert total(losses, allocate_greedily(losses, costs, budget)) <= total(losses, [0] * 6)


def test_ties_by_hand():
    """Two groups that would part choose one label; what is left of the budget goes to the third."""
    losses = [[9.0, 0.0], [2.0, 0.0], [3.0, 0.0]]
    costs = [[1.0, 2.0]] * 3
    assert allocate(losses, costs, 5) == [1, 0, 1] == allocate_greedily(losses, costs, 5)
    assert allocate(losses, costs, 4, ties=[(0, 1)]) == [0, 0, 1]  # no room for both
    assert allocate(losses, costs, 5, ties=[(0, 1)]) == [1, 1, 0] == allocate_greedily(losses, costs, 5, ties=[(0, 1)])
    # four choices, of which the first two and the last two agree in what is tied
    losses, costs = [[4.0, 3.0, 1.0, 0.0], [8.0, 7.0, 2.0, 0.0]], [[1.0, 2.0, 3.0, 4.0]] * 2
    both = {"ties": [(0, 1)], "labels": [0, 0, 1, 1]}
    assert allocate(losses, costs, 7, **both) == [2, 3] == allocate_greedily(losses, costs, 7, **both)
    assert allocate(losses, costs, 5, **both) == [1, 1]
    assert allocate(losses, costs, 5) == [0, 3]


def test_a_large_problem_is_solved():
    losses, costs, budget = problem(3, groups=200, choices=4)
    losses = [[x / 10**i for x in row] for i, row in enumerate(losses)]
    ties = [range(i, i + 4) for i in range(0, 200, 20)]
    for tied in ((), ties):
        exact, greedy = allocate(losses, costs, budget, tied), allocate_greedily(losses, costs, budget, tied)
        assert total(costs, exact) <= budget * (1 + 1e-12)
        assert total(losses, exact) <= total(losses, greedy) <= 1.05 * total(losses, exact)
        assert all(len({c[i] for i in tie}) == 1 for tie in tied for c in (exact, greedy))


def test_with_room_for_all_everyone_gets_the_best():
    losses, costs, _ = problem(0, groups=4, choices=3)
    assert allocate(losses, costs, 1e9) == [2, 2, 2, 2] == allocate_greedily(losses, costs, 1e9)


@pytest.mark.parametrize("method", [allocate, allocate_greedily])
def test_bad_problems(method):
    with pytest.raises(ValueError, match=r"expected a budget of 3 or more, got 2\. Raise the budget"):
        method([[1.0], [1.0]], [[1.0], [2.0]], 2)
    with pytest.raises(ValueError, match=r"expected a budget of 5 or more, got 4"):  # 3 without the tie
        method([[1.0, 0.0]] * 2, [[1.0, 3.0], [4.0, 2.0]], 4, ties=[(0, 1)])
    with pytest.raises(ValueError, match="a loss and a cost for every choice"):
        method([[1.0, 2.0]], [[1.0]], 2)
    with pytest.raises(ValueError, match="expected finite numbers"):
        method([[math.nan]], [[1.0]], 2)


def test_without_scipy_the_greedy_choice_is_the_way(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"the package scipy.*choose greedily"):
        allocate([[1.0]], [[1.0]], 2)
    assert allocate_greedily([[1.0]], [[1.0]], 2) == [0]
