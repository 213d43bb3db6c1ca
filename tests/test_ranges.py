"""Which numbers fix a static grid: their gradients in float64, their state, what they refuse."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant import QuantConfig, attach
from lightning_quant.attach import quant_layers
from lightning_quant.estimators import build_estimator
from lightning_quant.estimators.dsq import Dsq
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.ste import Ste
from lightning_quant.export.compressed_tensors import _check_layer
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.observers import build_observer
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.ranges import RANGES, build_range
from lightning_quant.ranges.bounds import SMALLEST
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from tests.loop import Run, check_folded, check_run
from tests.test_estimators import check, close, options_of

MINE = ("offset", "bounds", "log2")
METHODS = ("ste", "lsq", "ewgs", "dsq", "pege")


def spec_of(range_, bits=4, *, learn=True, kind="tensor", **more):
    size = 32 if kind == "group" else None
    return TensorSpec(bits, True, kind, size, False, "minmax", learn, grid="int", range=range_, **more)


def quantizer(method, range_, kind, dtype=torch.float64, *, bits=4, learn=True):
    """A quantizer with a random state and a range that some values lie beyond, off 0 for free ends."""
    rule = method if not isinstance(method, str) else build_estimator(method, options_of(method))
    if kind == "static":
        spec = resolve_activation(spec_of(range_, bits, learn=learn), False, rule)
        x = torch.randn(3, 5, 128, dtype=torch.float64)
        q = FakeQuantizer(spec, Granularity("tensor", None), rule, channels=128, dtype=dtype, salt=11)
    else:
        spec = resolve_weight(spec_of(range_, bits, learn=learn, kind=kind), True, rule)
        x = torch.randn(4, 128, dtype=torch.float64)
        q = FakeQuantizer(spec, Granularity(kind, 0, spec.group_size or 0), rule, shape=(4, 128), dtype=dtype, salt=11)
    x = (x + 0.5 * q.range.affine).to(dtype)
    for name, schedule in rule.schedules().items():
        q._buffers[name].fill_(schedule(0, 100))
    if "theta" in q._parameters:
        q.theta.data.uniform_()
    flat = q.granularity.flat(x).double()
    q.set_range(0.7 * flat.amin(dim=1), 0.6 * flat.amax(dim=1))
    return q, x.requires_grad_()


@pytest.mark.parametrize("kind", ["tensor", "channel", "group", "static"])
@pytest.mark.parametrize("range_", MINE)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_range_follow_the_chain_rule(method, range_, kind):
    q, x = quantizer(method, range_, kind)
    assert {n for n, _ in q.named_parameters()} >= set(q.range.initial())
    check(method, q, x)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("range_", MINE)
def test_narrow_dtypes_lose_only_their_rounding(range_, dtype, bound):
    """Sums over thousands of terms of either sign, measured against what the terms add up to without signs."""
    coarse, x = quantizer("dsq", range_, "static", dtype)
    fine, _ = quantizer("dsq", range_, "static")
    fine.load_state_dict(coarse.state_dict())
    y = coarse(x)
    assert y.dtype == dtype
    names = coarse.range.initial()
    got = torch.autograd.grad(y.sum(), [coarse._parameters[n] for n in names])
    want = torch.autograd.grad(fine(x.detach().double()).sum(), [fine._parameters[n] for n in names])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().item() <= bound * x.numel() * fine.range.factor(fine, x)


@pytest.mark.parametrize("range_", MINE)
@pytest.mark.parametrize("method", METHODS)
def test_fixed_ranges_are_buffers(method, range_):
    q, x = quantizer(method, range_, "group", learn=False)
    assert not set(q.range.initial()) & set(dict(q.named_parameters()))
    check(method, q, x)


@pytest.mark.parametrize(
    ("range_", "bits"), [(r, b) for r in MINE for b in (1, 1.58, 2, 3, 8) if r != "log2" or b > 1.6]
)
def test_other_widths(range_, bits):
    check("lsq", *quantizer("lsq", range_, "channel", bits=bits))


# --- published and hand-computed vectors


def terms(rule, range_, bits, x, values, names):
    """Outputs for ``x``, and for each of them dy/dx and dy/d of the range's parameters."""
    granularity = Granularity("tensor", None)
    q = FakeQuantizer(spec_of(range_, bits), granularity, rule, channels=1, dtype=torch.float64)
    for name, value in values.items():
        q._parameters[name].data.fill_(value)
    q.ready = True
    out, rows = [], []
    for v in x:
        at = tensor([[v]], dtype=torch.float64, requires_grad=True)
        y = q(at)
        out.append(y.item())
        rows.append([t.item() for t in torch.autograd.grad(y, (at, *(q._parameters[n] for n in names)))])
    return out, *map(list, zip(*rows, strict=True)), q.range.factor(q, at)


def test_vector_lsq_plus():
    """s = .5, beta = -.3, codes 0 to 3; the factor 1/sqrt(N Q_P) of one value is 1/sqrt(3)."""
    values = {"scale": 0.5, "offset": -0.3}
    out, dx, ds, db, factor = terms(Ste(), "offset", 2, [-0.9, -0.2, 0.1, 0.7, 3.0], values, ["scale", "offset"])
    assert out == pytest.approx([-0.3, -0.3, 0.2, 0.7, 1.2])
    assert dx == [0, 1, 1, 1, 0]
    assert factor == pytest.approx(1 / math.sqrt(3))
    assert ds == pytest.approx([v * factor for v in (0, -0.2, 0.2, 0, 3)], abs=1e-12)
    assert db == pytest.approx([v * factor for v in (1, 0, 0, 0, 1)])


def test_offset_factor_counts_what_shares_a_step():
    q, x = quantizer("ste", "offset", "group")
    assert q.range.factor(q, x) == pytest.approx(1 / math.sqrt(32 * 15))
    q, x = quantizer("ste", "offset", "static")
    assert q.range.factor(q, x) == pytest.approx(1 / math.sqrt(5 * 128 * 15))


@pytest.mark.parametrize(
    ("x", "bits", "hard", "dx", "du", "dl", "d_alpha"),
    [
        (0.3, 2, 1 / 3, 0.58667195, 0.27633600, 0.13699205, -0.05082794),
        (0.05, 2, 1 / 3, 1.33663740, -0.16771043, -0.16892696, -0.08392003),
        (0.7, 1, 1.0, 0.79953331, 0.22437434, -0.02390765, -0.40515755),
        (1.5, 2, 1.0, 0.0, 1.0, 0.0, 0.0),
        (-1.5, 2, -1.0, 0.0, 0.0, 1.0, 0.0),
    ],
)
def test_vector_dsq(x, bits, hard, dx, du, dl, d_alpha):
    """l = -1, u = 1, alpha = .2: derivatives of the soft staircase, with a hard forward."""
    out, *grads, _ = terms(Dsq(), "bounds", bits, [x], {"lower": -1.0, "upper": 1.0}, ["upper", "lower", "alpha"])
    assert out == pytest.approx([hard])
    for got, want in zip(grads, (dx, du, dl, d_alpha), strict=True):
        assert got == pytest.approx([want], rel=1e-6, abs=1e-9)


def test_dsq_moves_a_scale_by_the_hard_staircase_and_ends_by_the_soft_one():
    scaled, x = quantizer(Dsq(), "bounds", "tensor")
    ends = torch.autograd.grad(scaled(x).sum(), (scaled.upper, scaled.lower))
    hard, _ = quantizer(Ste(), "bounds", "tensor")
    hard.lower.data.copy_(scaled.lower.data)
    hard.upper.data.copy_(scaled.upper.data)
    assert not torch.allclose(ends[0], torch.autograd.grad(hard(x).sum(), hard.upper)[0], rtol=1e-2)
    spec = replace(spec_of("scale"), learn_scale=True)
    plain = FakeQuantizer(spec, Granularity("tensor", 0), Dsq(), shape=(4, 128), dtype=torch.float64)
    plain.fit_range(x)
    assert len(plain.estimator.inputs(plain, x, plain.scale)) == 1
    assert len(Dsq().inputs(scaled, x, scaled.upper)) == 2


@pytest.mark.parametrize(
    ("g", "of_x_n", "of_upper", "of_lower"),
    [(0.5, 0.499166667, -0.162229167, -0.087354167), (-0.5, -0.500833333, 0.162770833, 0.087645833)],
)
def test_vector_ewgs(g, of_x_n, of_upper, of_lower):
    """l = -1, u = 1, four levels, delta .1; the paper's output is x_q in [0, 1], so dL/dy here is g / (u - l).

    The paper's gradients of the ends are those of x_n alone; here the levels move with the ends too, which adds
    x_q to dy/du and 1 - x_q to dy/dl.
    """
    x_q, x_n = 2 / 3, 0.65
    q = FakeQuantizer(
        spec_of("bounds", 2), Granularity("tensor", None), Ewgs(delta=0.1), channels=1, dtype=torch.float64
    )
    q.lower.data.fill_(-1.0)
    q.upper.data.fill_(1.0)
    q.ready = True
    x = tensor([[0.3]], dtype=torch.float64, requires_grad=True)
    dx, du, dl = torch.autograd.grad(q(x), (x, q.upper, q.lower), tensor([[g / 2]], dtype=torch.float64))
    assert dx.item() == pytest.approx(of_x_n / 2, rel=1e-8)
    assert du.item() - g / 2 * x_q == pytest.approx(of_upper, rel=1e-8)
    assert dl.item() - g / 2 * (1 - x_q) == pytest.approx(of_lower, rel=1e-8)
    assert of_upper == pytest.approx(-of_x_n * x_n / 2, rel=1e-7)


@pytest.mark.parametrize(("step", "rounded"), [(0.013, 0.015625), (0.03, 0.03125), (0.1, 0.125), (0.125, 0.125)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_vector_tqt_rounds_the_step_up(step, rounded, bits):
    q, _ = quantizer("ste", "log2", "tensor", torch.float32, bits=bits)
    top = tensor([step * 2 ** (bits - 1)])
    q.set_range(-top, 0.1 * top)
    assert q.range.scale(q).tolist() == [rounded]
    assert q.log2_threshold.item() == pytest.approx(math.log2(top.item()))


def test_vector_tqt_gradient():
    """t = -.3: s = 1/2^(b-1); terms are round - x/s inside, -2 below, 1 above, times s ln 2."""
    s = 0.5
    _, dx, dt, factor = terms(
        Ste(), "log2", 2, [-1.2, -0.6, 0.2, 0.4, 0.6], {"log2_threshold": -0.3}, ["log2_threshold"]
    )
    assert factor == 1
    assert dx == [0, 1, 1, 1, 0]
    assert dt == pytest.approx([v * s * math.log(2) for v in (-2, 0.2, -0.4, 0.2, 1)], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_log2_scales_are_exact_powers_of_two(dtype):
    q, _ = quantizer("ste", "log2", "tensor", dtype, bits=8)
    for exponent in (-100, -7, 0, 1, 60):
        for shift in (-0.99, -0.5, 0.0):
            q.log2_threshold.data.fill_(exponent + shift)
            assert q.range.scale(q).item() == 2.0 ** (math.ceil(q.log2_threshold.item()) - 7)


# --- state


@pytest.mark.parametrize("range_", RANGES)
def test_before_a_range_is_set_each_sample_has_its_own_and_gradients_are_0(range_):
    """DistributedDataParallel wants a gradient for every parameter at every step, and a finite one."""
    rule = build_estimator("lsq")
    symmetric = range_ != "clip"
    spec = resolve_activation(replace(spec_of(range_), symmetric=symmetric), False, rule)
    q = FakeQuantizer(spec, Granularity("tensor", None), rule, channels=8)
    x = torch.rand(5, 8).requires_grad_()
    y = q(x)
    assert not q.ready
    assert y.isfinite().all()
    assert ((y - x).abs() <= x.amax(dim=1, keepdim=True) / 7).all()
    y.sum().backward()
    assert [p.grad.tolist() for p in q.parameters()] == [[0.0]] * len(list(q.parameters()))


@pytest.mark.parametrize("range_", RANGES)
def test_state_round_trip(range_):
    rule = build_estimator("lsq")
    spec = resolve_activation(replace(spec_of(range_), symmetric=range_ != "clip"), False, rule)
    q = FakeQuantizer(spec, Granularity("tensor", None), rule, channels=8)
    empty = copy.deepcopy(q)
    q.set_range(tensor([-0.7]), tensor([1.3]))
    fresh = copy.deepcopy(empty)
    fresh.load_state_dict(q.state_dict())
    assert fresh.ready
    x = torch.randn(4, 8)
    assert torch.equal(fresh(x), q(x))
    fresh.load_state_dict(empty.state_dict())
    assert not fresh.ready
    assert all(t.isfinite().all() and t.ndim == 1 for t in empty.state_dict().values())


@pytest.mark.parametrize("range_", MINE)
def test_rows_of_one_value_stay_that_value(range_):
    values = (-2.0, 0.0, 0.5) if range_ != "log2" else (-2.0, 0.0)
    rows = tensor(values)[:, None].expand(-1, 4).contiguous()
    q = FakeQuantizer(spec_of(range_, kind="channel"), Granularity("channel", 0), Ste(), shape=rows.shape)
    q.fit_range(rows)
    assert q.ready
    assert torch.equal(q(rows), rows)


@pytest.mark.parametrize("range_", ["offset", "bounds"])
def test_free_ends_use_all_codes_and_put_levels_on_the_ends(range_):
    for symmetric in (True, False):
        spec = replace(spec_of(range_, 2), symmetric=symmetric)
        q = FakeQuantizer(spec, Granularity("tensor", 0), Ste(), shape=(1, 4))
        weight = tensor([[5.0, 5.9, 7.1, 8.0]])
        q.fit_range(weight)
        assert q(weight).tolist() == [[5, 6, 7, 8]]
        code, scale, zero, offset = q.stored(weight)
        assert (code.tolist(), zero, offset.tolist(), scale.tolist()) == ([[-2, -1, 0, 1]], -2.0, [5.0], [1.0])
        assert q.on_grid(weight).tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize("observer", ["mse", "mse_ends", "lsq_init", "three_sigma"])
@pytest.mark.parametrize("range_", ["offset", "bounds"])
def test_observers_see_the_codes_that_free_ends_use(range_, observer):
    """Whether the spec says symmetric or not, the range is the one for a grid without a fixed zero point."""
    x = torch.randn(3, 64).exp()
    found = []
    for symmetric in (True, False):
        spec = replace(spec_of(range_, 3, kind="channel"), symmetric=symmetric, observer=observer)
        q = FakeQuantizer(spec, Granularity("channel", 0), Ste(), shape=(3, 64))
        q.fit_range(x)
        found.append([q._parameters[n].detach() for n in q.range.initial()])
    low, high = build_observer(observer, "here").range(x, Grid(3, False))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(q.range.offset(q), low[:, None])
    torch.testing.assert_close(q.range.offset(q) + 7 * q.range.scale(q), high[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("low", [0.0, 1.0, -300.0])
def test_bounds_stay_apart(low, dtype):
    q = FakeQuantizer(spec_of("bounds"), Granularity("tensor", None), Ste(), channels=4, dtype=dtype)
    q.set_range(tensor([low]), tensor([low + 1.0]))
    q.upper.data.fill_(low - 3.0)
    q.range.project(q)
    assert q.lower.item() == low
    assert (q.upper.double() - q.lower.double()).item() >= SMALLEST * (1 - 1e-2)
    assert q.range.scale(q).item() > 0
    assert q(torch.full((2, 4), low, dtype=dtype)).isfinite().all()
    q.set_range(tensor([low]), tensor([low]))
    assert q.ready


def test_the_controller_keeps_bounds_apart():
    run = Run("dsq", "w4a4-channel-static", range="bounds", calibration=1).steps(0, 3)
    layer = run.model[0]
    for q in (layer.weight_quant, layer.input_quant):
        q.upper.data.copy_(q.lower.data - 1)
    run.controller.after_optimizer_step()
    for q in (layer.weight_quant, layer.input_quant):
        assert (q.upper > q.lower).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
@pytest.mark.parametrize("range_", MINE)
def test_evaluation_is_what_is_stored(range_, kind, dtype):
    q, x = quantizer("dsq", range_, kind, dtype)
    y = q.eval()(x)
    assert torch.equal(y, q.on_grid(x))
    code, scale, zero, offset = q.stored(x)
    rebuilt = (q.granularity.view(code).float() - zero) * q.granularity.lift(scale)
    rebuilt = rebuilt if offset is None else rebuilt + q.granularity.lift(offset)
    assert torch.equal(rebuilt.reshape(x.shape).to(dtype), y)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
@pytest.mark.parametrize("kind", ["group", "static"])
@pytest.mark.parametrize("range_", MINE)
def test_compile_equals_eager(range_, kind):
    q, x = quantizer("dsq", range_, kind, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(q, fullgraph=True, backend="aot_eager")
    wrt = (x, *q.parameters())
    assert len(wrt) == 2 + len(q.range.initial())
    want, got = q(x), compiled(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(want.sum(), wrt))


@pytest.mark.parametrize("range_", MINE)
def test_the_measured_error_is_a_share_of_the_input_itself(range_):
    q, x = quantizer("ste", range_, "channel")
    q.measuring = True
    y = q(x)
    want = ((y - x).square().sum() / x.square().sum()).item()
    assert q.measured["error"].item() == pytest.approx(want, rel=1e-6)


def test_repr_names_the_range():
    q, _ = quantizer("ste", "offset", "channel")
    assert q.extra_repr() == "4 bits, channel, learned offset range, ste"


# --- use


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("range_", MINE)
@pytest.mark.parametrize("method", ["ste", "ewgs", "dsq", "pege"])
def test_training_with_every_range(method, range_, learn):
    run = check_run(lambda: Run(method, "w4a8-channel-static", range=range_, learn_scale=learn, calibration=4))
    for q in (run.model[0].weight_quant, run.model[0].input_quant):
        assert q.spec.range == range_
        names = set(q.range.initial())
        assert names <= set(q._parameters if learn else q._buffers)


@pytest.mark.parametrize("range_", MINE)
def test_folded_export(range_, tmp_path):
    check_folded(Run("lsq", "w3a16-channel", range=range_).steps(0, 5), tmp_path / "out")


AROUND = "around (0|a zero)"


@pytest.mark.parametrize(("range_", "message"), [("offset", AROUND), ("bounds", AROUND), ("log2", None)])
def test_compressed_tensors_has_no_place_for_offsets(range_, message):
    for where in ("weight", "activation"):
        config = QuantConfig.parse("lsq", "w8a8-static")
        config = replace(config, **{where: replace(getattr(config, where), range=range_)})
        model = nn.Sequential(nn.Linear(8, 8))
        attach(model, config)
        model[0].input_quant.set_range(tensor([-1.0]), tensor([1.0]))
        ((path, layer),) = quant_layers(model)
        if message is None:
            _check_layer(path, layer, [path], None, trained=True)
        else:
            with pytest.raises(ValueError, match=message):
                _check_layer(path, layer, [path], None, trained=True)


# --- refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec(4, range="offset", narrow=True), r"range='offset': expected all codes.*narrow=True. Leave grid"),
        (TensorSpec(4, range="bounds", grid="midrise"), r"range='bounds': expected all codes.*grid='midrise'"),
        (TensorSpec(4, range="bounds", grid="nf4"), r"grid='nf4': expected range='scale'"),
        (TensorSpec(4, range="offset", dynamic=True), r"range='offset': expected a static range.*Use -static"),
        (TensorSpec(4, range="bounds", scale_format="pow2"), r"scale_format='pow2': expected a symmetric grid"),
        (TensorSpec(4, False, range="log2"), r"range='log2': expected a symmetric grid.*Use range='scale'"),
        (TensorSpec(1, range="log2"), r"range='log2': expected integers of 2 to 8 bits, got grid='int' of 1 bits"),
        (TensorSpec(1.58, range="log2"), "integers of 2 to 8 bits"),
        (TensorSpec(4, range="log2", grid="midrise"), "got grid='midrise' of 4 bits"),
        (TensorSpec(4, range="ofset"), r"Did you mean range 'offset'"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message):
        resolve_weight(spec, False, Ste(), "fc.weight")


def test_free_ends_do_not_ask_for_asymmetric_grids():
    for symmetric in (None, True, False):
        spec = resolve_activation(TensorSpec(4, symmetric, range="bounds"), True, Ste())
        assert spec.dynamic is False
        assert build_range(spec.range, "here").affine


def test_close_can_fail():
    with pytest.raises(AssertionError, match="offset"):
        close(tensor([1.0]), np.array([1.1]), torch.float32, "offset")
