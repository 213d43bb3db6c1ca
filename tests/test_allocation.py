"""Mixed precision's choices: the exact one is brute force's, the greedy one keeps the budget and comes near."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_quant.allocation import allocate, allocate_greedily


def problem(seed: int, groups: int, choices: int) -> tuple[list[list[float]], list[list[float]], float]:
    draw = random.Random(seed)
    losses = [sorted((draw.random() * 10**i for _ in range(choices)), reverse=True) for i in range(groups)]
    costs = [[size * bits for bits in range(2, 2 + choices)] for size in (draw.randint(1, 50) for _ in range(groups))]
    least, most = sum(c[0] for c in costs), sum(c[-1] for c in costs)
    return losses, costs, least + (most - least) * draw.random()


def total(table: list[list[float]], chosen: list[int]) -> float:
    return sum(row[c] for row, c in zip(table, chosen, strict=True))


@pytest.mark.parametrize("seed", range(25))
def test_the_exact_choice_is_brute_forces(seed):
    losses, costs, budget = problem(seed, groups=6, choices=3)
    every = itertools.product(range(3), repeat=6)
    best = min(total(losses, list(c)) for c in every if total(costs, list(c)) <= budget)
    chosen = allocate(losses, costs, budget)
    assert total(costs, chosen) <= budget * (1 + 1e-9)
    assert total(losses, chosen) == pytest.approx(best, rel=1e-9)
    greedy = allocate_greedily(losses, costs, budget)
    assert total(costs, greedy) <= budget
    assert total(losses, greedy) >= best * (1 - 1e-9)
    cheapest = [0] * 6
    assert total(losses, greedy) <= total(losses, cheapest)


def test_a_large_problem_is_solved():
    losses, costs, budget = problem(3, groups=200, choices=4)
    losses = [[x / 10**i for x in row] for i, row in enumerate(losses)]
    exact, greedy = allocate(losses, costs, budget), allocate_greedily(losses, costs, budget)
    assert total(costs, exact) <= budget * (1 + 1e-9)
    assert total(losses, exact) <= total(losses, greedy) <= 1.05 * total(losses, exact)


def test_with_room_for_all_everyone_gets_the_best():
    losses, costs, _ = problem(0, groups=4, choices=3)
    assert allocate(losses, costs, 1e9) == [2, 2, 2, 2] == allocate_greedily(losses, costs, 1e9)


@pytest.mark.parametrize("method", [allocate, allocate_greedily])
def test_bad_problems(method):
    with pytest.raises(ValueError, match=r"expected a budget of 3 or more, got 2\. Raise the budget"):
        method([[1.0], [1.0]], [[1.0], [2.0]], 2)
    with pytest.raises(ValueError, match="a loss and a cost for every choice"):
        method([[1.0, 2.0]], [[1.0]], 2)
