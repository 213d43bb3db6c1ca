"""Methods that learn their steps: LSQ's start, LSQ+, TQT and SEQ, with the numbers of their papers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant import QuantConfig, attach
from lightning_quant.estimators import build_estimator
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.lsq_plus import LsqPlus
from lightning_quant.estimators.seq import Seq
from lightning_quant.estimators.tqt import Tqt
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.observers import OBSERVERS, build_observer
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec, parse_scheme
from tests.loop import Run, check_folded, check_run, convolutional
from tests.test_estimators import check, options_of

V = [-1.2, -0.35, -0.1, 0.12, 0.26, 0.9]


def scale_of(observer, values, bits, **grid):
    grid = Grid(bits, **grid)
    return grid.scale_and_zero(*build_observer(observer, "here").range(tensor([values]), grid))[0].item()


def weights(rule, bits, values, granularity="tensor", dtype=torch.float64):
    """A quantizer of one row as the method wants it, fitted to the row, and the row."""
    x = tensor([values], dtype=dtype, requires_grad=True)
    spec = resolve_weight(TensorSpec(bits, True, granularity), False, rule)
    q = FakeQuantizer(spec, Granularity(granularity, 0), rule, shape=x.shape, dtype=dtype)
    q.fit_range(x)
    return q, x


# --- where scales start


@pytest.mark.parametrize(("bits", "start"), [(2, 0.97666667), (4, 0.36914530)])
def test_vector_lsq_init(bits, start):
    assert scale_of("lsq_init", V, bits) == pytest.approx(start, rel=1e-7)
    q, _ = weights(Lsq(init="lsq"), bits, V)
    assert q.scale.item() == pytest.approx(start, rel=1e-7)
    assert weights(Lsq(), bits, V)[0].scale.item() != pytest.approx(start, rel=1e-2)


def test_lsq_init_of_other_grids():
    """Inputs that are never negative have 2^b - 1 codes above 0; one bit and ternary have Q_P = 1."""
    positive = [0.0, 1.0, 2.0, 5.0]
    assert scale_of("lsq_init", positive, 4, symmetric=False) == pytest.approx(2 * 2 / 15**0.5)
    low, high = build_observer("lsq_init", "here").range(tensor([[-1.0, 3.0]]), Grid(4, False))
    assert (low.item(), high.item()) == (-1.0, pytest.approx(-1 + 4 * 15**0.5))
    assert scale_of("lsq_init", V, 1.58) == pytest.approx(2 * np.abs(V).mean())
    assert scale_of("lsq_init", V, 1) == pytest.approx(2 * np.abs(V).mean())  # levels +-mean|v|


def test_lsq_init_averages_over_steps():
    old, new = (tensor([-1.0]), tensor([2.0])), (tensor([-3.0]), tensor([7.0]))
    assert [t.item() for t in build_observer("lsq_init", "here").merge(old, new)] == pytest.approx([-1.2, 2.5])


@pytest.mark.parametrize(
    ("scheme", "weight", "activation"),
    [
        ("w4a8", ("lsq_init", False), ("lsq_init", False)),
        ("w8a8-static", ("lsq_init", False), ("lsq_init", False)),
        ("w8a8-token", ("lsq_init", False), ("ema", True)),
    ],
)
def test_lsq_starts_the_papers_way_on_request(scheme, weight, activation):
    rule, (of_weight, of_input) = Lsq(init="lsq"), parse_scheme(scheme)
    got = resolve_weight(of_weight, False, rule)
    assert ((got.observer, got.dynamic), got.learn_scale) == (weight, True)
    got = resolve_activation(of_input, False, rule)
    assert (got.observer, got.dynamic) == activation
    assert resolve_weight(TensorSpec(4, observer="minmax"), False, rule).observer == "minmax"
    assert resolve_weight(TensorSpec(8, dynamic=True), False, rule).dynamic
    assert resolve_weight(TensorSpec(4), False, Lsq()).observer == "mse"


def test_lsq_refuses_an_unknown_start():
    with pytest.raises(ValueError, match=r"lsq.init: expected one of lsq, mse, got 'msee'. Did you mean start 'mse'"):
        Lsq(init="msee")


W_PLUS = [0.5, -0.1, 0.3, -0.8, 0.05, 0.02]


def test_vector_lsq_plus_weight_init():
    """The population's standard deviation, not the sample's, which gives .16772106."""
    assert scale_of("three_sigma", W_PLUS, 4) == pytest.approx(0.15316214, rel=1e-7)
    q, _ = weights(LsqPlus(), 4, W_PLUS)
    assert q.scale.item() == pytest.approx(0.15316214, rel=1e-7)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 8])
def test_three_sigma_on_other_grids(bits):
    row = np.array(W_PLUS)
    reach = max(abs(row.mean() - 3 * row.std()), abs(row.mean() + 3 * row.std()))
    negative = {1: 1, 1.58: 1}.get(bits) or 2 ** (bits - 1)
    assert scale_of("three_sigma", W_PLUS, bits) == pytest.approx(reach / negative, rel=1e-6)
    low, high = build_observer("three_sigma", "here").range(tensor([W_PLUS]), Grid(4, False))
    assert (low.item(), high.item()) == pytest.approx((row.mean() - 3 * row.std(), row.mean() + 3 * row.std()))


def brute_force(row, steps):
    """Least squared error over both ends by trying 100 x 100."""
    ends = np.linspace(0, 0.8, 100)
    low, high = row.min(), row.max()
    errors = []
    for a, b in itertools.product(ends, ends):
        lo, hi = low + a * (high - low), high - b * (high - low)
        if hi > lo:
            s = (hi - lo) / steps
            errors.append(((np.clip(np.round((row - lo) / s), 0, steps) * s + lo - row) ** 2).sum())
    return min(errors)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_ends_come_close_to_the_best_two_ends(bits):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 300, generator=generator)
    rows = torch.stack([nn.functional.silu(3 * x[0]), x[1] ** 3 + 4, x[2].exp()])
    low, high = build_observer("mse_ends", "here").range(rows, Grid(bits, False))
    steps = 2**bits - 1
    for row, lo, hi in zip(rows.double().numpy(), low.tolist(), high.tolist(), strict=True):
        s = (hi - lo) / steps
        error = ((np.clip(np.round((row - lo) / s), 0, steps) * s + lo - row) ** 2).sum()
        assert error <= 1.1 * brute_force(row, steps)
        assert row.min() - 1e-6 <= lo < hi <= row.max() + 1e-6
    symmetric = [build_observer(n, "here").range(rows, Grid(4)) for n in ("mse_ends", "mse")]
    assert symmetric[0][1].shape == symmetric[1][1].shape


def test_mse_ends_of_a_row_already_on_a_grid_keeps_it():
    row = tensor([[5.0, 6.0, 7.0, 8.0], [-1.0, -1.0, -1.0, -1.0]])
    low, high = build_observer("mse_ends", "here").range(row, Grid(2, False))
    assert (low.tolist(), high.tolist()) == ([5, -1], [8, -1])


# --- SEQ


@pytest.mark.parametrize(
    ("bits", "alpha", "x", "want"),
    [
        (2, 1.0, [-1.2, -0.6, -0.4, -0.1, 0.1, 0.4, 0.6, 0.95], [-0.75, -0.75, -0.25, -0.25, 0.25, 0.25, 0.75, 0.75]),
        (1.58, 1.0, [-1.0, -0.4, -0.3, 0.2, 0.34, 0.8], [-2 / 3, -2 / 3, 0, 0, 2 / 3, 2 / 3]),
        (1, 0.5, [-3.0, -0.1, 0.0, 0.2], [-0.5, -0.5, 0.5, 0.5]),
    ],
)
def test_vector_seq(bits, alpha, x, want):
    q, _ = weights(Seq(), bits, x)
    q.scale.data.fill_(alpha / {2: 2, 1.58: 1.5, 1: 0.5}[bits])
    assert q(tensor([x], dtype=torch.float64)).tolist() == [pytest.approx(want)]


@pytest.mark.parametrize(
    ("bits", "n", "x", "of_alpha", "of_x"),
    [
        (2, 2.0, [0.1, 0.6, 1.2, -1.2, 0.98, 0.995], [0.15, 0.15, 0.75, -0.75, -0.23, 0.75], [1, 1, 0, 0, 1, 0]),
        (1.58, 1.5, [0.2, 0.8, 1.2, -0.98, -0.995], [-0.2, 2 / 3 - 0.8, 2 / 3, 0.98 - 2 / 3, -2 / 3], [1, 1, 0, 1, 0]),
        (1, 0.5, [0.2, -0.9, 1.2, -3.0], [1, -1, 1, -1], [1, 1, 0, 0]),
    ],
)
def test_vector_seq_gradients(bits, n, x, of_alpha, of_x):
    """alpha = 1: dy/dalpha by element; the scale held is alpha / n, so that dy/ds = n dy/dalpha, times its factor."""
    q, _ = weights(Seq(), bits, x)
    q.scale.data.fill_(1 / n)
    for v, want, passes in zip(x, of_alpha, of_x, strict=True):
        one = FakeQuantizer(q.spec, Granularity("tensor", 0), Seq(), shape=(1, 1), dtype=torch.float64)
        one.scale.data.fill_(1 / n)
        one.ready = True
        at = tensor([[v]], dtype=torch.float64, requires_grad=True)
        gx, gs = torch.autograd.grad(one(at), (at, one.scale))
        assert gx.item() == passes
        assert gs.item() / n == pytest.approx(want)
    assert q.range.factor(q, tensor([x])) == pytest.approx(len(x) ** -0.5)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
def test_seq_starts_at_the_papers_alpha(bits):
    row = [-0.9, 0.1, 0.3, 0.5]
    alpha = {1: 0.45}.get(bits, 0.9)
    share = {1: 2.0, 1.58: 1 / 1.5, 2: 1 / 2, 3: 1 / 3, 4: 1 / 7}[bits]
    q, _ = weights(Seq(), bits, row, "channel")
    assert q.scale.item() == pytest.approx(alpha * share)
    assert q.scale.shape == (1, 1)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 3])
def test_seq_follows_its_oracle_without_a_learned_scale(bits):
    rule = Seq()
    spec = resolve_weight(TensorSpec(bits, learn_scale=False), False, rule)
    q = FakeQuantizer(spec, Granularity("channel", 0), rule, shape=(3, 16), dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    q.fit_range(x * 0.6)
    check("seq", q, x)
    assert (x.grad == 0).any()


def test_seq_is_per_row_and_gives_inputs_to_lsq():
    spec = resolve_weight(TensorSpec(2), False, Seq())
    assert (spec.granularity, spec.grid, spec.learn_scale, spec.dynamic) == ("channel", "midrise", True, False)
    assert resolve_weight(TensorSpec(8), False, Seq()).dynamic is False
    assert isinstance(Seq().role(False), Lsq)


# --- TQT


def test_vector_tqt_mask_ends_half_a_step_beyond_the_outermost_level():
    q, _ = weights(Tqt(), 2, [0.5, -1.0])
    q.log2_threshold.data.fill_(0.0)
    x = tensor([[-1.3, -1.2, 0.7, 0.8]], dtype=torch.float64, requires_grad=True)
    gx, gt = torch.autograd.grad(q(x).sum(), (x, q.log2_threshold))
    assert gx.tolist() == [[0, 1, 1, 0]]
    terms = [-2, -2 + 2.4, 1 - 1.4, 1]
    assert gt.item() == pytest.approx(0.5 * np.log(2) * sum(terms))


def test_tqt_scales_stay_powers_of_two_in_training():
    run = Run("tqt", "w4a8-channel-static", lr=0.02, calibration=2).steps(0, 10)
    for layer in (run.model[0], run.model[2]):
        for q in (layer.weight_quant, layer.input_quant):
            scale = q.range.scale(q).detach()
            assert torch.equal(scale.log2(), scale.log2().round())
            assert not torch.equal(q.log2_threshold, q.log2_threshold.round())


# --- all of them in training


LOOPS = [
    ("lsq", "w4a8-channel", {"init": "lsq"}),
    ("lsq_plus", "w4a4-channel", {}),
    ("lsq_plus", "w3a3-channel", {"model": convolutional}),
    ("tqt", "w4a8-channel-static", {}),
    ("tqt", "w8a8-tensor", {"model": convolutional}),
    ("seq", "w2a16", {}),
    ("seq", "w1a8", {"lr": 0.02}),
    ("seq", "w1.58a8", {}),
    ("seq", "w3a8", {"model": convolutional}),
]


@pytest.mark.parametrize(("method", "scheme", "more"), LOOPS)
def test_training(method, scheme, more):
    more = dict(more)
    model = more.pop("model", lambda: None)
    run = check_run(lambda: Run(method, scheme, model(), calibration=3, **more), drop=0.8)
    for name, p in run.model.named_parameters():
        if "quant" in name:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("method", "scheme"), [("lsq_plus", "w4a16-channel"), ("tqt", "w4a16-channel"), ("seq", "w2a16")]
)
def test_folded_export(method, scheme, tmp_path):
    check_folded(Run(method, scheme).steps(0, 5), tmp_path / "out")


def test_lsq_plus_inputs_have_a_learned_offset():
    run = Run("lsq_plus", "w4a4-channel", calibration=2).steps(0, 6)
    q = run.model[2].input_quant
    assert set(q.range.initial()) == {"scale", "offset"} == {n for n, _ in q.named_parameters()}
    assert q.offset.item() != 0
    assert q.spec.observer == "mse_ends"
    assert run.model[2].weight_quant.spec.observer == "three_sigma"


@pytest.mark.parametrize(
    ("method", "scheme", "options", "message"),
    [
        ("lsq_plus", "w4a16-channel-asym", {}, "method 'lsq_plus': expected symmetric=True, got symmetric=False"),
        ("lsq_plus", "w4a8-channel-token", {}, "method 'lsq_plus': expected dynamic=False, got dynamic=True"),
        ("lsq_plus", "w4a8-channel", {"range": "bounds"}, "method 'lsq_plus': expected range='scale'"),
        ("tqt", "w4a16-channel-asym", {}, "method 'tqt': expected symmetric=True"),
        ("tqt", "w4a8-channel", {"range": "scale"}, "method 'tqt': expected range='log2', got range='scale'"),
        ("tqt", "w1a16-channel", {}, "range='log2': expected integers of 2 to 8 bits"),
        ("tqt", "w4a16-channel", {"grid": "nf4"}, "grid='nf4': expected range='scale', got range='log2'"),
        ("seq", "w2a16", {"grid": "int"}, "method 'seq': expected grid='midrise', got grid='int'"),
        ("seq", "w2a16-asym", {}, "method 'seq': expected symmetric=True"),
        ("seq", "w4a16", {"range": "offset"}, "method 'seq': expected range='scale'"),
    ],
)
def test_refusals(method, scheme, options, message):
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(8, 8)), QuantConfig.parse(method, scheme, **options))


def test_names():
    assert {"lsq_init", "three_sigma", "seq_init", "mse_ends"} <= set(OBSERVERS)
    for name in ("lsq", "lsq_plus", "tqt", "seq"):
        rule = build_estimator(name, options_of(name))
        assert rule.about.link
        assert rule.learns_scale
