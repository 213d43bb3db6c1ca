"""Closed forms against tables computed by hand from the formulas."""

from __future__ import annotations

import itertools
import math

import pytest

from lightning_quant.schedule import CURVES, Schedule, as_schedule
from tests.oracle import replacement_share

TAUS = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 1.0)
TABLE = {  # from 0 to 1
    "linear": (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1),
    "cosine": (0, 0.0245, 0.1464, 0.5, 0.8536, 0.9755, 1),
    "exponential": (0, 0.0044, 0.0169, 0.0759, 0.2817, 0.6039, 1),
    "logarithmic": (0, 0.2788, 0.5119, 0.7404, 0.8893, 0.9590, 1),
    "replacement": (0, 0.2788, 0.5119, 0.7404, 0.8893, 0.9590, 1),
}


@pytest.mark.parametrize("curve", TABLE)
def test_table_from_zero_to_one(curve):
    schedule = Schedule(curve, 0.0, 1.0)
    assert [schedule(int(100 * tau), 100) for tau in TAUS] == pytest.approx(TABLE[curve], abs=5.1e-5)


def test_geometric_from_1e_4():
    schedule = Schedule("geometric", 1e-4, 1.0)
    values = [schedule(int(100 * tau), 100) for tau in TAUS]
    assert values == pytest.approx([1e-4, 10**-3.6, 1e-3, 1e-2, 1e-1, 10**-0.4, 1.0], rel=1e-12)


def test_precursor_exponential_ramp():
    # 1e-8 * e^(ln 5 * t / 250k) is 1.90e-8 at step 100k
    assert Schedule("geometric", 1e-8, 5e-8)(100_000, 250_000) == pytest.approx(1.90e-8, rel=2e-3)
    assert Schedule("geometric", 1e-8, 1e-6)(100_000, 250_000) == pytest.approx(6.31e-8, rel=1e-3)


def test_replacement_from_a_start():
    schedule = Schedule("replacement", 0.3, 1.0)
    values = [schedule(t, 100) for t in (10, 25, 50, 75)]
    assert values == pytest.approx([0.4465, 0.6017, 0.7780, 0.9030], abs=5.1e-5)
    assert values == pytest.approx([replacement_share(t / 100, 0.3) for t in (10, 25, 50, 75)], rel=1e-12)


@pytest.mark.parametrize(
    ("curve", "values"),
    [
        ("linear", (0.155, 0.11, 0.065)),
        ("geometric", (0.1125, 0.0632, 0.0356)),
        ("cosine", (0.1736, 0.11, 0.0464)),
    ],
)
def test_alpha_annealing(curve, values):
    schedule = Schedule(curve, 0.2, 0.02)
    assert [schedule(t, 4) for t in (1, 2, 3)] == pytest.approx(values, abs=5.1e-5)


def test_hardness_is_linear_in_k():
    schedule = Schedule("hardness", 0.2, 0.02)
    k = [math.log(2 / schedule(t, 4) - 1) for t in range(5)]
    assert k == pytest.approx([2.1972246 + (4.5951199 - 2.1972246) * t / 4 for t in range(5)], rel=1e-7)


@pytest.mark.parametrize("curve", CURVES)
def test_ends_and_beyond(curve):
    schedule = Schedule(curve, 0.2, 0.6, delay=0.25, until=0.75)
    assert schedule(75, 100) == pytest.approx(0.6)
    assert schedule(100, 100) == schedule(140, 100) == pytest.approx(0.6)
    if curve != "constant":
        assert schedule(0, 100) == schedule(25, 100) == pytest.approx(0.2)
        assert 0.2 < schedule(50, 100) < 0.6


@pytest.mark.parametrize("curve", [c for c in CURVES if c != "constant"])
def test_monotone(curve):
    values = [Schedule(curve, 0.1, 0.9)(t, 200) for t in range(201)]
    assert all(b >= a for a, b in itertools.pairwise(values))


def test_constant_needs_no_length():
    assert not Schedule("constant", 0.3, 0.3).needs_total
    assert Schedule("constant", 0.3, 0.3)(5, None) == 0.3
    assert Schedule("linear", 0.3, 0.3)(5, None) == 0.3


@pytest.mark.parametrize("total", [None, 0, -1])
def test_moving_schedule_needs_the_length(total):
    with pytest.raises(ValueError, match=r"the number of optimizer steps of the run, got .*Set max_steps"):
        Schedule("linear", 0.0, 1.0)(0, total)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curve": "cosin"}, "Did you mean curve 'cosine'"),
        ({"curve": "geometric", "start": 0.0, "end": 1.0}, "start and end above 0"),
        ({"curve": "hardness", "start": 0.2, "end": 1.0}, r"alphas in \(0, 1\)"),
        ({"delay": 1.0}, "0 <= delay < until <= 1"),
        ({"delay": -0.1}, "0 <= delay < until <= 1"),
        ({"delay": 0.5, "until": 0.5}, "0 <= delay < until <= 1"),
        ({"until": 1.5}, "0 <= delay < until <= 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


def test_as_schedule():
    assert as_schedule(0.5, "lam") == Schedule("constant", 0.5, 0.5)
    assert as_schedule({"curve": "linear", "end": 1.0}, "lam") == Schedule("linear", 0.0, 1.0)
    made = Schedule("cosine", 0.0, 1.0)
    assert as_schedule(made, "lam") is made
    with pytest.raises(ValueError, match=r"lam: expected the fields of Schedule.*'stop'"):
        as_schedule({"stop": 1.0}, "lam")
    with pytest.raises(ValueError, match="lam: expected a number or a mapping of Schedule fields, got 'cosine'"):
        as_schedule("cosine", "lam")


def test_constant_switches_at_its_delay():
    switch = Schedule("constant", start=0.0, end=1.0, delay=0.5)
    assert [switch(step, 10) for step in (0, 4, 5, 10)] == [0.0, 0.0, 1.0, 1.0]
    assert Schedule("constant", start=0.0, end=1.0)(0, None) == 1.0
    with pytest.raises(ValueError, match="number of optimizer steps"):
        switch(0, None)
