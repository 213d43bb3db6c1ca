"""Closed forms against tables computed by hand from the formulas."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_quant.schedule import CURVES, Schedule, as_schedule
from lightning_quant.spec import QuantConfig, YamlLoader
from tests.oracle import replacement_share

POINTED = ("piecewise", "steps")
RAMPS = [c for c in CURVES if c not in ("constant", *POINTED)]
INQ = ((0.0, 0.5), (0.25, 0.75), (0.5, 0.875), (0.75, 1.0))  # its accumulated share, in four phases

TAUS = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 1.0)
TABLE = {  # from 0 to 1
    "linear": (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1),
    "cosine": (0, 0.0245, 0.1464, 0.5, 0.8536, 0.9755, 1),
    "exponential": (0, 0.0044, 0.0169, 0.0759, 0.2817, 0.6039, 1),
    "logarithmic": (0, 0.2788, 0.5119, 0.7404, 0.8893, 0.9590, 1),
    "sigmoid": (0, 0.0114, 0.0701, 0.5, 0.9299, 0.9886, 1),
    "adaround": (0, 0, 0.0625, 0.375, 0.6875, 0.875, 1),
    "replacement": (0, 0.2788, 0.5119, 0.7404, 0.8893, 0.9590, 1),
}
LOGARITHMS = {  # by kappa = base - 1
    1: (0, 0.1375, 0.3219, 0.5850, 0.8074, 0.9260, 1),
    9: (0, 0.2788, 0.5119, 0.7404, 0.8893, 0.9590, 1),
    99: (0, 0.5187, 0.7054, 0.8516, 0.9383, 0.9774, 1),
}
FORMULAS = {  # once more, in float64; s is the logistic function
    "linear": lambda t, a, b: a * (1 - t) + b * t,
    "cosine": lambda t, a, b: (a + b) / 2 + (a - b) / 2 * np.cos(np.pi * t),
    "geometric": lambda t, a, b: np.exp((1 - t) * np.log(a) + t * np.log(b)),
    "exponential": lambda t, a, b: a + (b - a) * (np.exp(5 * t) - 1) / (np.exp(5) - 1),
    "logarithmic": lambda t, a, b: a + (b - a) * np.log(1 + 9 * t) / np.log(10),
    "sigmoid": lambda t, a, b: a + (b - a) * (logistic(10 * t - 5) - logistic(-5)) / (logistic(5) - logistic(-5)),
    "adaround": lambda t, a, b: np.interp(t, [0.2, 1], [a, b]),
    "hardness": lambda t, a, b: 2 / (1 + (2 / a - 1) ** (1 - t) * (2 / b - 1) ** t),
    "replacement": lambda t, a, b: np.log(10**a * (1 - t) + 10**b * t) / np.log(10),
}


def logistic(x):
    return 1 / (1 + np.exp(-x))


def read(text):
    return as_schedule(yaml.load(text, YamlLoader), "lam")


@pytest.mark.parametrize("curve", TABLE)
def test_table_from_zero_to_one(curve):
    schedule = Schedule(curve, 0.0, 1.0)
    assert [schedule(int(100 * tau), 100) for tau in TAUS] == pytest.approx(TABLE[curve], abs=5.1e-5)


@pytest.mark.parametrize("curve", ["logarithmic", "replacement"])
@pytest.mark.parametrize("kappa", LOGARITHMS)
def test_table_of_logarithms(curve, kappa):
    schedule = Schedule(curve, 0.0, 1.0, base=kappa + 1)
    assert [schedule(int(100 * tau), 100) for tau in TAUS] == pytest.approx(LOGARITHMS[kappa], abs=5.1e-5)


def test_base_10_has_the_same_bits_as_the_plain_formulas():
    log, replacement = Schedule("logarithmic", 0.3, 0.7), Schedule("replacement", 0.3, 0.7)
    for tau in (t / 100 for t in range(1, 100)):
        assert log(tau, 1) == 0.3 + (0.7 - 0.3) * math.log1p(9 * tau) / math.log1p(9)
        assert replacement(tau, 1) == math.log10(10**0.3 + (10**0.7 - 10**0.3) * tau)


def test_replacement_of_base_2_from_a_start():
    # log2(2^0.3 + (2 - 2^0.3) tau): 2^0.3 = 1.2311444, so at a half log2(1.6155722)
    schedule = Schedule("replacement", 0.3, 1.0, base=2)
    assert schedule(1, 2) == pytest.approx(0.6920453, abs=1e-7)
    taus = np.linspace(0.01, 0.99, 25)
    values = [schedule(float(tau), 1) for tau in taus]
    assert values == pytest.approx(list(replacement_share(taus, 0.3, base=2.0)), rel=1e-12)


@pytest.mark.parametrize("curve", RAMPS)
def test_formula(curve):
    taus = np.linspace(0, 1, 41)
    for start, end in ((0.2, 0.9), (0.9, 0.2)):
        values = [Schedule(curve, start, end)(float(tau), 1) for tau in taus]
        assert values == pytest.approx([float(FORMULAS[curve](tau, start, end)) for tau in taus], rel=1e-12)


def test_adaround_beta():
    beta = Schedule("adaround", 20, 2)
    values = [beta(t, 10_000) for t in (0, 1000, 2000, 4000, 6000, 8000, 10_000, 12_000)]
    assert values == [20, 20, 20, 15.5, 11, 6.5, 2, 2]
    assert beta(2001, 10_000) < 20


def test_adaround_holds_for_a_fifth_of_what_the_delay_leaves():
    beta = Schedule("adaround", 20, 2, delay=0.5)
    assert [beta(t, 100) for t in (0, 50, 60, 80, 100)] == pytest.approx([20, 20, 20, 11, 2], abs=1e-12)
    beta = Schedule("adaround", 20, 2, until=0.5)
    assert [beta(t, 100) for t in (0, 10, 30, 50, 100)] == pytest.approx([20, 20, 11, 2, 2], abs=1e-12)


def test_adaround_is_linear_with_a_delay():
    curve, delayed = Schedule("adaround", 20, 2), Schedule("linear", 20, 2, delay=0.2)
    assert [curve(t, 50) for t in range(51)] == pytest.approx([delayed(t, 50) for t in range(51)], abs=1e-12)


def test_sigmoid_is_odd_around_the_middle():
    schedule = Schedule("sigmoid", -1.0, 1.0)
    assert schedule(50, 100) == 0
    assert [schedule(50 + t, 100) for t in range(51)] == pytest.approx([-schedule(50 - t, 100) for t in range(51)])


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


@pytest.mark.parametrize("curve", ["constant", *RAMPS])
def test_ends_and_beyond(curve):
    schedule = Schedule(curve, 0.2, 0.6, delay=0.25, until=0.75)
    assert schedule(75, 100) == pytest.approx(0.6)
    assert schedule(100, 100) == schedule(140, 100) == pytest.approx(0.6)
    if curve != "constant":
        assert schedule(0, 100) == schedule(25, 100) == pytest.approx(0.2)
        assert 0.2 < schedule(50, 100) < 0.6


@st.composite
def ramps(draw):
    """A ramp of any curve with ends that every curve takes, and the length of a run."""
    curve = draw(st.sampled_from(RAMPS))
    start, end = draw(st.tuples(*[st.floats(1e-3, 0.999)] * 2))
    delay, width = draw(st.floats(0, 0.9)), draw(st.floats(0.01, 1))
    base = draw(st.floats(1.01, 1000)) if curve in ("logarithmic", "replacement") else 10.0
    schedule = Schedule(curve, start, end, delay, until=min(delay + width, 1.0), base=base)
    return schedule, draw(st.integers(1, 300))


@given(ramps())
def test_monotone_between_exact_ends(case):
    schedule, total = case
    values = np.array([schedule(t, total) for t in range(total + 5)])
    low, high = min(schedule.values), max(schedule.values)
    room = 1e-12 * high  # of rounding
    assert ((values >= low - room) & (values <= high + room)).all()
    steps = np.diff(values) * np.sign(schedule.end - schedule.start)
    assert (steps >= -room).all()
    shares = np.arange(total + 5) / total
    assert (values[shares <= schedule.delay] == schedule.start).all()
    assert (values[shares >= schedule.until] == schedule.end).all()
    assert schedule.first == values[0] == schedule.start


numbers = st.floats(-1e3, 1e3)


@st.composite
def tables(draw):
    shares = draw(st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True))
    return tuple((share, draw(numbers)) for share in sorted(shares))


@given(tables(), st.integers(1, 100))
def test_points_are_met_and_never_left(points, total):
    lines, stairs = (Schedule(curve, points=points) for curve in POINTED)
    shares, values = (np.array(column) for column in zip(*points, strict=True))
    for t in range(total + 1):
        tau = t / total
        assert lines(t, total) == pytest.approx(float(np.interp(tau, shares, values)), rel=1e-9, abs=1e-9)
        assert stairs(t, total) == ([values[0], *values[shares <= tau]])[-1]
    assert all(s(share, 1) == value for s in (lines, stairs) for share, value in points)
    assert lines.first == stairs.first == lines.start == lines(0, total) == points[0][1]
    assert lines.end == lines(total, total) == lines(2 * total, total) == points[-1][1]
    assert lines.needs_total == any(value != points[0][1] for _, value in points)
    assert lines.values == tuple(value for _, value in points)


def test_piecewise():
    schedule = Schedule(curve="piecewise", points=((0.0, 0.0), (0.3, 0.5), (1.0, 1.0)))
    values = [schedule(t, 100) for t in (0, 15, 30, 65, 100, 130)]
    assert values == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], rel=1e-12)
    inner = Schedule(curve="piecewise", points=((0.25, 3.0), (0.75, 1.0)))
    assert [inner(t, 8) for t in range(9)] == [3, 3, 3, 2.5, 2, 1.5, 1, 1, 1]


def test_steps():
    schedule = Schedule(curve="steps", points=INQ)
    assert [schedule(t, 8) for t in range(9)] == [0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 1, 1, 1]
    late = Schedule(curve="steps", points=((0.5, 2.0), (0.9, 3.0)))
    assert [late(t, 10) for t in (0, 4, 5, 8, 9, 10)] == [2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("curve", POINTED)
def test_points_that_return_to_the_start_move(curve):
    schedule = Schedule(curve, points=((0.0, 0.0), (0.5, 1.0), (1.0, 0.0)))
    assert schedule.start == schedule.end == 0
    assert schedule.needs_total
    assert schedule(5, 10) == 1
    with pytest.raises(ValueError, match=f"'{curve}'.*the number of optimizer steps"):
        schedule(5, None)


@pytest.mark.parametrize("curve", POINTED)
def test_points_that_never_move_need_no_length(curve):
    schedule = Schedule(curve, points=((0.2, 3.0), (0.4, 3.0)))
    assert not schedule.needs_total
    assert schedule.first == schedule(7, None) == 3


def test_points_are_hashable_and_survive_copies():
    schedule = Schedule(curve="steps", points=[[0, 0.5], [1, 1]])
    assert schedule.points == ((0.0, 0.5), (1.0, 1.0))
    assert all(type(number) is float for point in schedule.points for number in point)
    assert hash(schedule) == hash(Schedule(curve="steps", points=((0.0, 0.5), (1.0, 1.0))))
    assert Schedule(**asdict(schedule)) == replace(schedule) == schedule
    assert hash(Schedule("linear", points=[])) == hash(Schedule("linear"))


@pytest.mark.parametrize(
    "schedule", [Schedule("cosine", 0.0, 1e-3, delay=0.3), Schedule("steps", points=INQ), Schedule("logarithmic", 0, 1)]
)
def test_through_the_config_in_yaml(tmp_path, schedule):
    QuantConfig(options={"lam": schedule}).to_yaml(tmp_path / "q.yaml")
    back = QuantConfig.from_yaml(tmp_path / "q.yaml")
    assert as_schedule(back.options["lam"], "lam") == schedule


def test_delay_then_ramp_from_yaml():
    schedule = read("{curve: cosine, start: 0, end: 1e-3, delay: 0.3, until: 0.9}")
    assert schedule == Schedule("cosine", 0.0, 1e-3, delay=0.3, until=0.9)
    values = [schedule(t, 1000) for t in (0, 300, 450, 600, 750, 900, 1000)]
    assert values == pytest.approx([0, 0, 1.464466e-4, 5e-4, 8.535534e-4, 1e-3, 1e-3], rel=1e-6)
    assert values[1] == 0
    assert values[-2] == values[-1] == 1e-3


def test_points_from_yaml():
    inq = read("{curve: steps, points: [[0, .5], [.25, .75], [.5, .875], [.75, 1]]}")
    assert inq == Schedule(curve="steps", points=INQ)
    lines = read("curve: piecewise\npoints:\n- [0, 1e-8]\n- [0.5, 1e-6]\n- [1, 0]\n")
    assert [lines(t, 4) for t in range(5)] == pytest.approx([1e-8, 5.05e-7, 1e-6, 5e-7, 0], rel=1e-12)


def test_base_and_hold_from_yaml():
    assert read("{curve: logarithmic, end: 1, base: 100}")(25, 100) == pytest.approx(0.7054, abs=5.1e-5)
    assert read("{curve: adaround, start: 20, end: 2}")(6000, 10_000) == 11
    assert read("1e-3") == Schedule("constant", 1e-3, 1e-3)


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
        (
            {"curve": "logarithmic", "base": 1},
            r"Schedule\(logarithmic\).base: expected a finite number above 1, got 1\. ",
        ),
        ({"curve": "replacement", "base": 0.5}, "a finite number above 1, got 0.5"),
        ({"curve": "logarithmic", "base": math.inf}, "a finite number above 1, got inf"),
        ({"curve": "logarithmic", "base": math.nan}, "a finite number above 1, got nan"),
        ({"curve": "cosine", "base": 2.0}, r"Schedule\(cosine\): expected no base, got 2.0. Only 'logarithmic'"),
        ({"points": INQ}, r"Schedule\(constant\): expected no points, got .*Choose curve 'piecewise' or 'steps'"),
        ({"curve": "steps", "points": INQ, "base": 2.0}, "expected no base"),
        (
            {"curve": "steps", "points": INQ, "start": 0.1},
            r"points alone, got .*= \(0.1, 0.0, 0.0, 1.0\) as well\. Leave",
        ),
        ({"curve": "piecewise", "points": INQ, "end": 2.0}, r"Schedule\(piecewise\): expected points alone"),
        ({"curve": "piecewise", "points": INQ, "delay": 0.1}, "expected points alone"),
        ({"curve": "piecewise", "points": INQ, "until": 0.9}, "expected points alone"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**settings)


@pytest.mark.parametrize("curve", POINTED)
@pytest.mark.parametrize(
    "points",
    [
        (),
        None,
        5,
        "12",
        ["01"],
        [0.0, 1.0],
        {0.0: 1.0},
        [[0.0, 1.0, 2.0]],
        [["0", 1.0]],
        [[0.0, "1"]],
        [[0.0, None]],
        [[0.5, 1.0], [0.0, 2.0]],
        [[0.5, 1.0], [0.5, 2.0]],
        [[-0.1, 1.0]],
        [[0.0, 1.0], [1.1, 2.0]],
        [[math.nan, 1.0]],
        [[0.0, 1.0], [math.nan, 2.0], [1.0, 3.0]],
        [[0.0, math.nan]],
        [[0.0, 1.0], [1.0, math.inf]],
    ],
)
def test_points_that_are_refused(curve, points):
    expected = (
        r"one or more pairs \(share of the run in \[0, 1\], finite value\) by growing share, got .*Write for example"
    )
    with pytest.raises(ValueError, match=rf"Schedule\({curve}\).points: expected {expected}"):
        Schedule(curve, points=points)


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
    assert Schedule("constant", start=0.0, end=1.0)(0, None) == Schedule("constant", start=0.0, end=1.0).first == 1.0
    assert switch.first == 0.0
    with pytest.raises(ValueError, match="number of optimizer steps"):
        switch(0, None)
