"""Grids whose levels are not evenly spaced: the levels, the rounding, every estimator's gradient on them."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, tensor

from lightning_quant import QuantConfig, attach
from lightning_quant.codebooks import CODEBOOKS
from lightning_quant.estimators import build_estimator
from lightning_quant.estimators.ste import Ste
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from tests import oracle
from tests.loop import Run, check_folded, check_run
from tests.oracle.pege import expected as uniform_pege
from tests.test_estimators import gather, options_of, spread

ALL = [(name, bits, signed) for name, book in CODEBOOKS.items() for bits in book.widths for signed in (True, False)]
USUAL = [("nf4", 4), ("e4m3", 8), ("e5m2", 8), ("e2m1", 4), ("apot", 4), ("pow2", 4)]
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def on(name, bits, x, signed=True):
    grid = Grid(bits, signed, name)
    return grid.round(x, grid.table())


# --- levels


def test_e2m1_levels():
    positive = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert Grid(4, False, "e2m1").levels == positive
    assert Grid(4, True, "e2m1").levels == (*(-v for v in reversed(positive[1:])), *positive)


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_levels_are_torchs_finite_values(name):
    every = torch.arange(256, dtype=torch.uint8).view(FLOAT8[name]).double()
    finite = every[every.isfinite()].unique()
    assert Grid(8, True, name).levels == tuple(finite.tolist())
    assert Grid(8, False, name).levels == tuple(finite[finite >= 0].tolist())


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_rounding_is_torchs_cast(name):
    """All levels, all halfway points (ties to even, subnormals among them) and their neighbours."""
    levels = tensor(Grid(8, True, name).levels, dtype=torch.float32)
    halves = (levels[1:] + levels[:-1]) / 2
    assert torch.equal(halves.double(), (levels.double()[1:] + levels.double()[:-1]) / 2)
    around = [torch.nextafter(halves, tensor(side)) for side in (-math.inf, math.inf)]
    x = torch.cat([levels, halves, *around, torch.randn(2000) * levels[-1] / 4, torch.randn(2000) * 1e-4])
    x = x.clamp(levels[0], levels[-1])
    assert torch.equal(on(name, 8, x), x.to(FLOAT8[name]).float())
    assert torch.equal(on(name, 8, x.abs(), False), x.abs().to(FLOAT8[name]).float())


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_saturates(name):
    top = Grid(8, True, name).top
    assert on(name, 8, tensor([math.inf, -math.inf, 2 * top, -3 * top])).tolist() == [top, -top, top, -top]


def test_e2m1_ties_go_to_the_even_mantissa():
    """.25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4."""
    halves = tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    want = [0, 1, 1, 2, 2, 4, 4]
    assert on("e2m1", 4, halves).tolist() == want
    assert on("e2m1", 4, -halves).tolist() == [-v for v in want]


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """Evenly spaced shares from 1/2 to .9677083: 8 steps above 0, 7 below, scaled to a largest level of 1."""
    share, quantile = 0.9677083, NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.5, share, 9)]
    below = [-quantile(p) for p in np.linspace(share, 0.5, 8)[:-1]]
    want = np.array([*below, *above]) / above[-1]
    levels = np.array(Grid(4, True, "nf4").levels)
    assert np.abs(levels - want).max() < 1e-6
    assert levels[7] == 0
    assert Grid(4, False, "nf4").levels == tuple(levels[7:])


@pytest.mark.parametrize(
    ("magnitude_bits", "terms"),
    [
        (1, [[0]]),
        (2, [[0, 1, 2]]),
        (3, [[0, 1, 3], [2]]),
        (4, [[0, 2, 4], [1, 3, 5]]),
        (5, [[0, 2, 5], [1, 3, 6], [4]]),
        (6, [[0, 3, 6], [1, 4, 7], [2, 5, 8]]),
    ],
)
def test_apot_levels_are_sums_of_powers_of_two(magnitude_bits, terms):
    """Exponents of each term; its other value is 0.  Written out for the widths of the authors' code."""
    choices = [[0.0, *(2.0**-e for e in term)] for term in terms]
    sums = sorted({sum(c) for c in itertools.product(*choices)})
    assert len(sums) == 2**magnitude_bits
    want = [v / sums[-1] for v in sums]
    if magnitude_bits > 1:
        assert Grid(magnitude_bits, False, "apot").levels == pytest.approx(want)
    assert Grid(magnitude_bits + 1, True, "apot").levels == pytest.approx([*(-v for v in want[:0:-1]), *want])


def test_vector_inq():
    """b = 3, max |w| = .9: n1 = floor(log2(1.2)) = 0 and n2 = -1."""
    w = tensor([0.9, -0.4, 0.11, 0.02])
    grid = Grid(3, True, "pow2")
    scale = grid.scale(w.abs().max())
    assert (grid.round(w / scale, grid.table()) * scale).tolist() == [1, -0.5, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_pow2_levels_follow_the_papers_exponents(bits):
    grid = Grid(bits, True, "pow2")
    for s in np.exp(np.random.default_rng(1).uniform(-8, 8, 200)):
        n1 = math.floor(math.log2(4 * s / 3))
        n2 = n1 + 1 - 2 ** (bits - 1) // 2
        want = [2.0**n for n in range(n2, n1 + 1)]
        scale = grid.scale(tensor(s)).item()
        assert [v * scale for v in grid.levels] == [*(-v for v in reversed(want)), 0.0, *want]
    assert len(grid.levels) <= 2**bits
    assert grid.scale(tensor([0.0, 0.75, 1.5])).tolist() == [1, 1, 2]
    assert not grid.covers


@pytest.mark.parametrize(("name", "bits", "signed"), ALL)
def test_every_codebook_keeps_its_promises(name, bits, signed):
    """Ascending, at most 2^b levels with 0 among them, signed ones with negative levels; covering scales cover."""
    grid = Grid(bits, signed, name)
    levels = np.array(grid.levels)
    assert (np.diff(levels) > 0).all()
    assert len(levels) <= 2**bits
    assert 0.0 in grid.levels
    assert (levels.min() < 0) == signed
    assert (grid.low, grid.high, grid.zero, grid.top) == (0, len(levels) - 1, 0.0, levels[-1])
    if grid.covers:
        absmax = torch.rand(50, dtype=torch.float64) * 10 + 1e-3
        assert (absmax / grid.scale(absmax) <= grid.top * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebooks_refuse_other_widths(name):
    with pytest.raises(
        ValueError, match=rf"TensorSpec.grid='{name}': expected one of .* bits, got 1. Write for example"
    ):
        Grid(1, True, name)


def test_weights_have_signed_levels():
    with pytest.raises(
        ValueError, match=r"w: grid='apot': expected signed levels, got symmetric=False. Leave -asym out"
    ):
        resolve_weight(TensorSpec(4, False, grid="apot"), False, Ste(), "w")
    assert resolve_activation(TensorSpec(4, False, dynamic=False, grid="apot"), False, Ste()).symmetric is False


# --- laws of the rounding

books = st.sampled_from(USUAL)
values = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20)


@given(values, books)
def test_idempotent_and_on_grid(x, book):
    name, bits = book
    once = on(name, bits, tensor(x))
    levels = tensor(Grid(bits, True, name).levels, dtype=torch.float64).float()
    assert torch.isin(once, levels).all()
    assert torch.equal(on(name, bits, once), once)


@given(values, books)
def test_monotone(x, book):
    assert (on(*book, tensor(x).sort().values).diff() >= 0).all()


@given(values, books)
def test_nearest(x, book):
    """No level is nearer, by brute force in float64."""
    name, bits = book
    levels = tensor(Grid(bits, True, name).levels, dtype=torch.float64)
    x = tensor(x)
    distance = (on(name, bits, x).double() - x.double()).abs()
    least = (levels[None] - x.double()[:, None]).abs().amin(dim=1)
    assert (distance <= least * (1 + 1e-6) + 1e-7).all()


@given(values, books, st.integers(-6, 6))
def test_scaling_data_by_a_power_of_two_scales_the_result(x, book, power):
    name, bits = book
    x, factor, grid = tensor(x), 2.0**power, Grid(bits, True, name)
    if x.abs().max() < 1e-30:
        return  # all-zero data keep scale 1; subnormal numbers do not scale exactly
    one, other = grid.scale(x.abs().max()), grid.scale((x * factor).abs().max())
    table = grid.table()
    assert torch.equal(grid.round(x * factor / other, table) * other, grid.round(x / one, table) * one * factor)


@given(values, st.sampled_from([(n, b, s) for n, b in USUAL for s in (True, False)]))
def test_level_undoes_place(x, book):
    """Places are the levels' own at levels, halfway between them in the middle, and cut off at both ends."""
    name, bits, signed = book
    grid = Grid(bits, signed, name)
    table, levels = grid.table(), tensor(grid.levels, dtype=torch.float64)
    x = tensor(x, dtype=torch.float64)
    place, width = grid.place(x, table)
    inside = x.clamp(levels[0], levels[-1])
    torch.testing.assert_close(grid.level(place, table), inside, rtol=1e-12, atol=1e-12 * grid.top)
    assert ((place >= 0) & (place <= grid.high)).all()
    assert torch.isin(width, levels.diff()).all()
    own, _ = grid.place(levels, table)
    assert torch.equal(own, torch.arange(len(levels), dtype=torch.float64))
    middle, width = grid.place((levels[1:] + levels[:-1]) / 2, table)
    torch.testing.assert_close(middle, torch.arange(len(levels) - 1) + 0.5, check_dtype=False)
    torch.testing.assert_close(width, levels.diff())
    assert torch.equal(grid.dequantize(grid.nearest(levels, table), table), levels)


def test_infinite_places_are_the_ends():
    grid = Grid(4, True, "nf4")
    place, _ = grid.place(tensor([-math.inf, math.inf]), grid.table())
    assert place.tolist() == [0, 15]


# --- in a quantizer


def quantizer(method, name, bits, kind, *, signed=True, dtype=torch.float64):
    """A quantizer on a codebook with a random state, and an input some of which lies beyond its range."""
    rule = build_estimator(method, options_of(method))
    size = 32 if kind == "group" else None
    if kind == "static":
        spec = TensorSpec(bits, signed, "tensor", None, False, "minmax", True, name)
        spec = resolve_activation(spec, False, rule)
        x = torch.randn(3, 5, 128, dtype=torch.float64)
        x = x if signed else x.abs() - 0.1
        q = FakeQuantizer(spec, Granularity("tensor", None), rule, channels=128, dtype=dtype)
    else:
        spec = resolve_weight(TensorSpec(bits, True, kind, size, False, "minmax", True, name), True, rule)
        x = torch.randn(4, 128, dtype=torch.float64)
        q = FakeQuantizer(spec, Granularity(kind, 0, size or 0), rule, shape=(4, 128), dtype=dtype)
    for key, schedule in rule.schedules().items():
        q._buffers[key].fill_(schedule(0, 100))
    if "theta" in q._parameters:
        q.theta.data.uniform_()
    flat = q.granularity.flat(x).to(dtype)
    q.set_range(0.6 * flat.amin(dim=1), 0.6 * flat.amax(dim=1))
    return q, x.to(dtype).requires_grad_()


def index_space(method, q, x, g):
    """y and all gradients in float64, on the places of levels: F = l_i + (phi + 1/2) (l_{i+1} - l_i).

    A rule's D is the same function of the place in the bin as on a uniform grid; only widths differ.
    """
    levels = np.array(q.grid.levels)
    xs, gs = (t.detach().double().numpy() for t in (x, g))
    s = spread(q, x, q.scale)
    u = xs / s
    mask = (u >= levels[0]) & (u <= levels[-1])
    v = np.clip(u, levels[0], levels[-1])
    i = np.minimum(np.searchsorted(levels, v, side="right") - 1, len(levels) - 2)
    width = levels[i + 1] - levels[i]
    r = (v - levels[i]) / width - 0.5
    level = np.where(r > 0, levels[i + 1], levels[i])
    gs_in, state, pull = gs * mask, {}, 0.0
    slope = np.ones_like(xs)
    if method == "ewgs":
        e = (r + 0.5) - (r > 0)
        slope = 1 + q.estimator.delta * np.sign(gs) * e / (len(levels) - 1)
    elif method == "dsq":
        a = q.alpha.item()
        k = np.log(2 / a - 1)
        sech2 = 1 / np.cosh(k * r) ** 2
        slope = k * sech2 / (2 * (1 - a))
        turn = np.tanh(k * r) / (1 - a) ** 2 - 2 * r * sech2 / (a * (2 - a) * (1 - a))
        state["alpha"] = gs_in * s * width / 2 * turn
    elif method == "pege":
        b, k = spread(q, x, q.theta), q.sharpness.item()
        phi = np.tanh(k * r) / (2 * np.tanh(k / 2))
        slope = 1 + b * (k / np.cosh(k * r) ** 2 / (2 * np.tanh(k / 2)) - 1)
        f = levels[i] + width * (r + 0.5 + b * (phi - r))
        lam = q.lam.item() / (1 if q.is_weight else xs.size)
        pull = 2 * lam * s * (f - level) * mask
        state["theta"] = (gs_in + pull) * s * width * (phi - r)
    task = gs_in * slope
    of_scale = gather(q, x, gs * level - task * u, q.scale.shape)
    n = xs.size // q.scale.numel() if q.is_weight else math.prod(xs.shape[1:])
    state = {name: gather(q, x, t, q._parameters[name].shape) for name, t in state.items()}
    return level * s, (gs_in + pull) * slope, of_scale / np.sqrt(n * max(levels[-1], 1)), state


def near(got, want, what):
    bound = 1e-6 * max(np.abs(want).max(), 1e-3)
    assert np.abs(got.detach().double().numpy() - want).max() <= bound, what


@pytest.mark.parametrize("kind", ["channel", "group", "tensor", "static", "unsigned"])
@pytest.mark.parametrize(("name", "bits"), USUAL)
@pytest.mark.parametrize("method", ["ste", "lsq", "ewgs", "dsq", "pege"])
def test_gradients_on_codebooks(method, name, bits, kind):
    kinds = {"unsigned": ("static", False)}
    kind, signed = kinds.get(kind, (kind, True))
    q, x = quantizer(method, name, bits, kind, signed=signed)
    g = torch.randn_like(x)
    y = q(x)
    y.backward(g)
    want_y, want_x, want_s, want_state = index_space(method, q, x, g)
    near(y, want_y, "output")
    near(x.grad, want_x, "gradient of x")
    near(q.scale.grad, want_s, "gradient of the scale")
    learned = dict(q.named_parameters())
    assert set(learned) == {"scale", *want_state}
    for key, want in want_state.items():
        near(learned[key].grad, want, key)
    if name != "pow2":
        assert (x.grad == 0).any()  # the range was set inside the data


def test_the_oracle_of_codebooks_is_the_usual_one_on_even_levels():
    """The two formulas agree where a codebook happens to be uniform: 2-bit apot is {-1, 0, 1}."""
    q, x = quantizer("pege", "apot", 2, "channel")
    g = torch.randn_like(x)
    y, gx, _, _ = index_space("pege", q, x, g)
    arrays = [t.detach().double().numpy() for t in (x, g)]
    s, b = spread(q, x, q.scale), spread(q, x, q.theta)
    case = oracle.Case(
        *arrays, s, np.zeros_like(s), -1, 1, 1.58, True, True, 0, 0, q.scale_shape,
        state={"theta": b}, schedules={"lam": q.lam.item(), "sharpness": q.sharpness.item()},
    )  # fmt: skip
    want = uniform_pege(case)
    np.testing.assert_allclose(y, want.y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gx, want.x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casting_a_model_leaves_the_codebook_alone(dtype):
    q, x = quantizer("ste", "nf4", 4, "channel", dtype=torch.float32)
    before = q.table.clone()
    q.to(dtype)
    assert q.table.dtype == torch.int64
    assert torch.equal(q.table, before)
    assert q.scale.dtype == dtype
    assert "table" not in q.state_dict()
    y = q.eval()(x.detach().to(dtype))
    places = (y.double() / q.scale.detach().double())[..., None] - tensor(q.grid.levels)
    assert places.abs().amin(dim=-1).max() <= {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-12)


@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
@pytest.mark.parametrize(("name", "bits"), USUAL)
def test_stored_places_rebuild_the_forward(name, bits, kind):
    q, x = quantizer("ste", name, bits, kind, dtype=torch.float32)
    y = q.eval()(x)
    code, scale, zero, offset = q.stored(x)
    assert (code.dtype, zero, offset) == (torch.int16, 0.0, None)
    levels = tensor(q.grid.levels, dtype=torch.float64).float()
    rebuilt = levels[q.granularity.view(code).long()] * q.granularity.lift(scale)
    assert torch.equal(rebuilt.reshape(x.shape), y)
    assert torch.equal(q.on_grid(x), y)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
@pytest.mark.parametrize("method", ["lsq", "ewgs", "dsq", "pege"])
def test_compile_equals_eager(method):
    q, x = quantizer(method, "apot", 4, "group", dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    wrt = (x, *q.parameters())
    want, got = q(x), compiled(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(want.sum(), wrt))


def test_lsq_scales_of_codebooks_count_the_top_level():
    q, x = quantizer("lsq", "e4m3", 8, "channel")
    assert q.range.factor(q, x) == pytest.approx(1 / math.sqrt(128 * 448))
    q, x = quantizer("lsq", "nf4", 4, "group")
    assert q.range.factor(q, x) == pytest.approx(1 / math.sqrt(32))


# --- from the scheme to the export


@pytest.mark.parametrize("method", ["ste", "pege"])
@pytest.mark.parametrize(
    "preset", ["fp8", "fp8a16", "mxfp4", "mxfp4a16", "mxfp8", "nvfp4", "nvfp4a16", "nf4", "nf4-g32"]
)
def test_presets_end_to_end(preset, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 8))
    attach(model, QuantConfig.parse(method, preset))
    layer = model[0]
    x, y = torch.randn(16, 128), torch.randn(16, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    q = layer.weight_quant.eval()
    weight = q(layer.weight)
    assert torch.equal(weight, q.on_grid(layer.weight))
    code, scale, _, _ = q.stored(layer.weight)
    levels = tensor(q.grid.levels, dtype=torch.float64).float()
    rebuilt = levels[q.granularity.view(code).long()] * q.granularity.lift(scale)
    assert torch.equal(rebuilt.reshape(weight.shape), weight)
    relative = (weight - layer.weight).norm() / layer.weight.norm()
    assert relative < (0.05 if "8" in preset else 0.2)
    a16 = preset.endswith("a16") or preset.startswith("nf4")
    assert (layer.input_quant is None) == a16
    if not a16:
        inner = layer.input_quant(x)
        assert 0 < (inner - x).norm() / x.norm() < (0.05 if "8" in preset else 0.2)


@pytest.mark.parametrize("grid", ["apot", "pow2", "nf4", "e2m1"])
@pytest.mark.parametrize("method", ["ste", "lsq", "ewgs", "dsq", "pege"])
def test_any_method_on_any_codebook(method, grid, tmp_path):
    run = check_run(lambda: Run(method, "w4a16-g8", grid=grid), drop=0.8)
    assert run.model[0].weight_quant.spec.grid == grid
    check_folded(run, tmp_path / "out")


def test_codebooks_by_keyword():
    spec = QuantConfig.parse("lsq", "w4a16-g32", grid="apot").weight
    spec = resolve_weight(spec, False, build_estimator("lsq"))
    assert (spec.grid, spec.dynamic, spec.learn_scale, spec.range) == ("apot", False, True, "scale")
    nf4 = QuantConfig.parse("lsq", "nf4-g32").weight  # a storage format: scales follow the weights
    assert resolve_weight(nf4, False, build_estimator("lsq")).dynamic
    nf4 = QuantConfig.parse("lsq", "nf4-g32", learn_scale=True).weight
    nf4 = resolve_weight(nf4, False, build_estimator("lsq"))
    assert (nf4.dynamic, nf4.learn_scale) == (False, True)
    with pytest.raises(ValueError, match=r"Did you mean grid 'apot'"):
        attach(nn.Sequential(nn.Linear(8, 8)), QuantConfig.parse("lsq", "w4a16-g8", grid="apott"))
