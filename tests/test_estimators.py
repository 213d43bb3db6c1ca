"""The gradient contract: backward equals the stated formula for every estimator, dtype and granularity."""

from __future__ import annotations

import importlib
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn, tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_quant.estimators import ESTIMATORS, Estimator, FakeQuantize, build_estimator
from lightning_quant.estimators.dsq import Dsq
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.pege import Pege
from lightning_quant.estimators.pege_replace import PegeReplace
from lightning_quant.estimators.ste import Ste
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation, resolve_weight
from lightning_quant.scheme import TensorSpec
from tests import oracle

LAM = 2.0**-3  # exact in float32, in which scheduled scalars live


def oracle_of(method):
    """The method's formula in float64: ``tests/oracle/<method>.py``, with the options and grids it wants."""
    name = method if isinstance(method, str) else next(n for n, kind in ESTIMATORS.items() if type(method) is kind)
    return importlib.import_module(f"tests.oracle.{name}")


def options_of(method):
    return getattr(oracle_of(method), "OPTIONS", {})


def widths_of(method):
    return getattr(oracle_of(method), "BITS", (4, 1.58, 2, 8))


def kinds_of(method):
    return getattr(oracle_of(method), "KINDS", KINDS)


def fact(method, name, default=None):
    """A fact the method's oracle states in capitals.

    ``OPTIONS`` for its constructor; ``BITS``, ``KINDS`` and ``ASYMMETRIC``: grids it exists for; ``NEUTRAL``:
    options that make it the straight-through estimator; ``SOFT``: training does not compute with the hard grid;
    ``UNMASKED``: gradients pass beyond the range; ``STATE``: what its tensors start from, as functions of their shape.
    """
    return getattr(oracle_of(method), name, default)


DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float64: 1e-11}
KINDS = ("channel", "group", "tensor", "token", "static")


def quantizer_of(method, kind, dtype=torch.float32, *, bits=None, symmetric=True, learn=None, shape=(4, 128)) -> tuple:
    """A quantizer with a random state, and an input of which some values lie beyond its range."""
    whole = method if isinstance(method, Estimator) else build_estimator(method, options_of(method))
    is_weight = kind not in ("token", "static")
    rule = whole.role(is_weight)
    bits = bits or widths_of(whole)[0]
    if is_weight:
        spec = TensorSpec(bits, symmetric, kind, 32 if kind == "group" else None, learn_scale=learn)
        spec = rule.prefer(spec, True, "weight")
        spec = resolve_weight(replace(spec, observer=spec.observer or "mse"), True, rule)
        size = spec.group_size or 0
        x = torch.randn(shape, dtype=torch.float64)
        q = FakeQuantizer(spec, Granularity(spec.granularity, 0, size), rule, shape=shape, dtype=dtype, salt=11)
    else:
        dynamic = kind == "token"
        symmetric = symmetric and fact(whole, "SYMMETRIC", True)
        spec = TensorSpec(bits, symmetric, "token" if dynamic else "tensor", None, dynamic, learn_scale=learn)
        spec = resolve_activation(spec, False, rule)
        x = torch.randn(3, 5, shape[1], dtype=torch.float64)
        q = FakeQuantizer(spec, Granularity(spec.granularity, None), rule, channels=shape[1], dtype=dtype, salt=11)
    x = x.to(dtype)
    for name, schedule in rule.schedules().items():
        q._buffers[name].fill_(schedule(0, 100))
    if "step" in q._buffers:
        q.step.fill_(5)
    if isinstance(q._parameters.get("theta"), nn.Parameter):
        q.theta.data.uniform_()
    for name, start in fact(whole, "STATE", {}).items():
        if name in q.state_dict():
            q.state_dict()[name].copy_(torch.from_numpy(start(tuple(q.state_dict()[name].shape))))
    if not spec.dynamic:
        flat = q.granularity.flat(rule.transform(q, x)).detach().double()
        q.set_range(0.7 * flat.amin(dim=1), 0.6 * flat.amax(dim=1))
    return q, x.requires_grad_()


def array(t):
    return t.detach().double().numpy()


def spread(q, x, values):
    """What is shared spread over the elements of ``x``; written without the code under test."""
    values = array(values)
    if values.size == 1:
        return np.full(x.shape, values.item())
    if values.shape == tuple(x.shape) or not q.is_weight:
        return np.broadcast_to(values, x.shape)
    return np.repeat(values, x.shape[1] // values.shape[1], axis=1)


def gather(q, x, terms, shape):
    """Sum of per-element terms over what shares a tensor of this shape."""
    if terms.shape == tuple(shape):
        return terms
    if math.prod(shape) == 1:
        return terms.sum().reshape(tuple(shape))
    if not q.is_weight:
        return terms.reshape(-1, *shape).sum(axis=0)
    return terms.reshape(*shape, -1).sum(axis=-1)


def case_of(q, x, g):
    """The quantizer's input and state for its oracle."""
    xs, beta = array(x), 0.0
    if q.spec.dynamic and not q.is_weight and q.observer.covers:
        absmax = np.abs(array(q.estimator.transform(q, x))).max(axis=-1, keepdims=True)
        s, z = oracle.scale_symmetric(absmax, q.spec.bits), np.full_like(xs, -0.5 if q.spec.bits == 1 else 0.0)
        wide = torch.promote_types(x.dtype, torch.float32)  # kernels keep these scales in float32
        s = np.broadcast_to(array(tensor(s).to(wide)), xs.shape)
    else:
        s, z, beta = q.scale_zero_offset(q.estimator.transform(q, x))
        s = spread(q, x, s)
        beta = 0.0 if beta is None else spread(q, x, beta)
        z = spread(q, x, z) if isinstance(z, torch.Tensor) else np.full(xs.shape, z)
    tensors = {n: t for n, t in q.state_dict(keep_vars=True).items() if n != "running"}
    state = {n: spread(q, x, t) for n, t in tensors.items()}
    if "theta" in q._buffers:
        state["theta"] = state["theta"] / 255
    return oracle.Case(
        x=xs - beta,
        g=array(g),
        s=s,
        z=z,
        low=oracle.bounds(q.spec.bits)[0] + (q.spec.narrow and bool(q.spec.symmetric) and q.spec.bits > 1.58),
        high=oracle.bounds(q.spec.bits)[1],
        bits=q.spec.bits,
        clips=q.clips,
        is_weight=q.is_weight,
        step=5,
        salt=q.salt,
        scale_shape=q.scale_shape,
        offset=beta,
        options={f.name: getattr(q.estimator, f.name) for f in fields(q.estimator) if f.init},
        state=state,
        schedules={n: array(q._buffers[n]).item() for n in q.estimator.schedules()},
    )


def expected(method, q, x, g):
    """(y, dL/dx, dL/d of the range's parameters, dL/dstate) by the method's oracle."""
    case = case_of(q, x, g)
    result = oracle_of(method).expected(case)
    terms = oracle.scale_terms(case, result)
    ranges = {}
    if q.range_parameters():
        n = x.numel() // math.prod(q.scale_shape) if q.is_weight else math.prod(x.shape[1:])
        of_scale, of_offset = (gather(q, x, t, q.scale_shape) for t in (terms, case.g - result.x))
        scale = array(q.scale_zero_offset(x)[0])
        ranges = oracle.range_gradients(q.spec.range, of_scale, of_offset, n, (case.low, case.high), scale)
    state = {
        name: gather(q, x, terms, q._parameters[name].shape)
        for name, terms in result.state.items()
        if name in q._parameters
    }
    return result.y + case.offset, result.x, ranges, state


def close(got, want, dtype, what):
    """Elementwise, relative to the size of the array's entries."""
    bound = TOLERANCE[dtype] * max(np.abs(want).max(), 1e-3)
    assert got.shape == want.shape, what
    assert np.abs(array(got) - want).max() <= bound, what


def spec_of(kind, size=None):
    """Four bits, symmetric, fixed scales."""
    return resolve_weight(TensorSpec(4, True, kind, size, False, "mse", False), True, Ste())


def off_ties(x, bits):
    """Inputs moved away from the middle between two codes of a dynamic grid, where the last bit decides."""
    u = x.detach().double() / (x.detach().double().abs().amax(-1, keepdim=True) / oracle.bounds(bits)[1])
    tie = ((u - u.floor() - 0.5).abs() < 1e-4) & (u.abs() < u.abs().amax(-1, keepdim=True))
    return x.detach().masked_fill(tie, 0.0).requires_grad_()


def check(method, q, x):
    if q.spec.dynamic and not q.is_weight:
        x = off_ties(x, q.spec.bits)
    g = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    y = q(x)
    assert y.dtype == x.dtype
    y.backward(g)
    want_y, want_x, want_range, want_state = expected(method, q, x, g)
    close(y, array(tensor(want_y).to(x.dtype)), x.dtype, "output")
    close(x.grad, want_x, x.dtype, "gradient of x")
    assert (array(x.grad)[want_x == 0] == 0).all()
    for name, want in want_range.items():
        close(q._parameters[name].grad, want, x.dtype, f"gradient of the range's {name}")
    learned = dict(q.named_parameters())
    assert set(want_state) == set(learned) - set(q.range.initial())
    for name, want in want_state.items():
        close(learned[name].grad, want, x.dtype, f"gradient of {name}")


CASES = [(m, k) for m in ESTIMATORS for k in kinds_of(m)]
WEIGHTS = ("group", "channel", "tensor")
# One kind of weights per method, and static inputs where it has them.
COMPILED = [(m, next(k for k in WEIGHTS if k in kinds_of(m))) for m in ESTIMATORS if {*WEIGHTS} & {*kinds_of(m)}]
COMPILED += [(m, k) for m, k in CASES if k == "static"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "kind"), CASES)
def test_backward_is_the_stated_formula(method, kind, dtype):
    check(method, *quantizer_of(method, kind, dtype))


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, k in CASES if k != "token" and fact(m, "ASYMMETRIC", True)])
def test_asymmetric_grids(method, kind):
    check(method, *quantizer_of(method, kind, torch.float64, symmetric=False, bits=3))


@pytest.mark.parametrize(("method", "bits"), [(m, b) for m in ESTIMATORS for b in widths_of(m)[1:]])
def test_other_widths(method, bits):
    kind = "channel" if "channel" in kinds_of(method) else kinds_of(method)[0]
    check(method, *quantizer_of(method, kind, torch.float64, bits=bits))


@pytest.mark.parametrize("method", [m for m in ESTIMATORS if "group" in kinds_of(m)])
def test_fixed_scales(method):
    q, x = quantizer_of(method, "group", torch.float64, learn=False)
    check(method, q, x)
    assert "scale" not in dict(q.named_parameters())


@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
@pytest.mark.parametrize(("theta", "theta_dtype"), [("element", "float32"), ("element", "uint8"), ("channel", "uint8")])
def test_pege_sharing(theta, theta_dtype, kind):
    rule = Pege(theta=theta, theta_dtype=theta_dtype, lam=LAM, sharpness=4.0, initial=0.5)
    check("pege", *quantizer_of(rule, kind, torch.float64))


@pytest.mark.parametrize("group_size", [64, 128])
def test_pege_group_theta_when_one_group_fills_the_row(group_size):
    """A row of one scale group is cut into groups of 64 for Theta, as under per-channel scales."""
    rule = Pege(lam=LAM, initial=0.5)
    spec = spec_of("group", group_size)
    x = torch.randn(3, group_size, dtype=torch.float64, requires_grad=True)
    grouped = FakeQuantizer(spec, Granularity("group", 0, group_size), rule, shape=x.shape, dtype=x.dtype)
    spec = spec_of("channel")
    by_row = FakeQuantizer(spec, Granularity("channel", 0), rule, shape=x.shape, dtype=x.dtype)
    for q in (grouped, by_row):
        q.lam.fill_(LAM)
        q.theta.data.copy_(torch.linspace(0, 1, q.theta.numel()).reshape(q.theta.shape))
        q.fit_range(x)
    assert torch.equal(grouped(x), by_row(x))
    g = torch.randn_like(x)
    grads = [torch.autograd.grad(q(x), (x, q.theta), g) for q in (grouped, by_row)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-14, atol=1e-14)


# --- the ends of the range ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mask_is_closed_and_ends_at_the_outermost_level(bits, dtype):
    low, high = oracle.bounds(bits)
    edge = tensor([float(low), float(high)], dtype=dtype)
    beyond = torch.nextafter(edge, edge * 2)
    x = torch.cat([edge, beyond, tensor([-math.inf, math.inf], dtype=dtype)]).requires_grad_()
    FakeQuantize.apply(
        x, tensor([1.0], dtype=dtype), 0.0, None, Grid(bits), True, 1.0, True, False, Ste()
    ).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("method", [m for m in ESTIMATORS if "tensor" in kinds_of(m)])
def test_infinite_and_zero_inputs_have_finite_gradients(method):
    q, _ = quantizer_of(method, "tensor", learn=False, shape=(1, 4))
    x = tensor([[-math.inf, 0.0, 1e-3, math.inf]], requires_grad=True)
    q.eval()(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[0, 0] == x.grad[0, 3] == 0) or fact(method, "UNMASKED")


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, k in CASES if k in ("token", "static")])
def test_empty_batch(method, kind):
    """A float layer takes an empty batch (an expert without tokens), so a quantized one does."""
    q, _ = quantizer_of(method, kind)
    x = torch.empty(0, 128, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 128)


# --- neutral settings -----------------------------------------------------------------------------------------------

NEUTRAL = [(m, k) for m, k in CASES if fact(m, "NEUTRAL") is not None]


@pytest.mark.parametrize(("method", "kind"), NEUTRAL)
def test_neutral_setting_is_straight_through(method, kind):
    grads, bits = [], widths_of(method)[0]
    for rule in (ESTIMATORS[method](**fact(method, "NEUTRAL")), Ste()):
        torch.manual_seed(1)
        q, x = quantizer_of(rule, kind, torch.float64, bits=bits, learn=False)
        if method == "pege" and "theta" in dict(q.named_parameters()):
            q.theta.data.zero_()
        y = q(x)
        y.backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape))
        grads.append((y.detach(), x.grad))
    tolerance = 1e-6 if method == "dsq" else 0.0  # alpha -> 1 is a limit
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=tolerance)


def test_pege_with_b_1_is_dsq():
    alpha = 0.2
    pege = Pege(theta="channel", initial=1.0, lam=0.0, sharpness=math.log(2 / alpha - 1))
    grads = []
    for rule in (pege, Dsq(alpha=alpha)):
        torch.manual_seed(1)
        q, x = quantizer_of(rule, "channel", torch.float64, learn=False)
        if rule is pege:
            q.theta.data.fill_(1.0)
        q(x).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)


# --- published and hand-computed vectors ----------------------------------------------------------------------------


def run(rule, x, scale, bits, g, inputs=(), zero=0.0, factor=1.0, blending=False):
    """Output and gradients of x, scale and inputs for hand-written numbers in float64."""
    x, scale = (tensor(v, dtype=torch.float64, requires_grad=True) for v in (x, scale))
    inputs = tuple(tensor(v, dtype=torch.float64, requires_grad=True) for v in inputs)
    y = FakeQuantize.apply(x, scale, zero, None, Grid(bits), True, factor, True, blending, rule, *inputs)
    y.backward(tensor(g, dtype=torch.float64))
    return y.tolist(), x.grad.tolist(), scale.grad.tolist(), [i.grad for i in inputs]


def test_vector_ste():
    x, g = [-1.2, -0.35, -0.1, 0.12, 0.26, 0.9], [1.0] * 6
    y, gx, _, _ = run(Ste(), x, [0.25], 2, g)
    assert y == [-0.5, -0.25, 0, 0, 0.25, 0.25]
    assert gx == [0, 1, 1, 1, 0, 0]  # clamp first: .26 lies beyond .25


@pytest.mark.parametrize(
    ("bits", "y", "terms", "factor", "total"),
    [
        (2, [-0.5, -0.25, 0, 0, 0.25, 0.25], [-2, 0.4, 0.4, -0.48, 1, 1], 0.40824829, 0.13063945),
        (4, [-1.25, -0.25, 0, 0, 0.25, 1.0], [-0.2, 0.4, 0.4, -0.48, -0.04, 0.4], 0.15430335, 0.07406561),
    ],
)
def test_vector_lsq(bits, y, terms, factor, total):
    x = [-1.2, -0.35, -0.1, 0.12, 0.26, 0.9]
    for i, term in enumerate(terms):
        _, _, gs, _ = run(Lsq(), x, [0.25], bits, np.eye(6)[i].tolist())
        assert gs == pytest.approx([term])
    spec = replace(spec_of("tensor"), bits=bits, learn_scale=True)
    q = FakeQuantizer(spec, Granularity("tensor"), Lsq(), shape=(1, 6), dtype=torch.float64)
    q.scale.data.fill_(0.25)
    q.ready = True
    weight = tensor([x], dtype=torch.float64)
    out = q(weight)
    out.sum().backward()
    assert out.tolist() == [y]
    assert q.range.factor(q, weight) == pytest.approx(factor, rel=1e-7)
    assert q.scale.grad.item() == pytest.approx(total, rel=1e-7)


@pytest.mark.parametrize(
    ("x", "bits", "hard", "dx", "d_alpha"),
    [
        (0.3, 2, 1 / 3, 0.58667195, -0.05082794),
        (0.05, 2, 1 / 3, 1.33663740, -0.08392003),
        (0.7, 1, 1.0, 0.79953331, -0.40515755),
    ],
)
def test_vector_dsq(x, bits, hard, dx, d_alpha):
    """Range [-1, 1], alpha .2: the step is 2 / (2^b - 1) and the lowest level lies at -1."""
    scale = 2 / (2**bits - 1)
    zero = oracle.bounds(bits)[0] + 1 / scale
    y, gx, _, (g_alpha,) = run(Dsq(), [x], [scale], bits, [1.0], inputs=([0.2],), zero=zero)
    assert y == pytest.approx([hard])
    assert gx == pytest.approx([dx], rel=1e-7)
    assert g_alpha.tolist() == pytest.approx([d_alpha], rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "peak", "trough"),
    [
        (0.5, 1.0986, 0.8240),
        (0.4, 1.1552, 0.7394),
        (0.2, 1.3733, 0.4944),
        (0.1, 1.6358, 0.3108),
        (0.02, 2.3444, 0.0928),
    ],
)
def test_dsq_slopes(alpha, peak, trough):
    """Steepest between two levels, flattest on them, 1 on average over a bin."""
    x = (np.arange(1000) + 0.5) / 1000
    _, gx, _, _ = run(Dsq(), [0.5, 0.0, *x], [1.0], 4, [1.0] * 1002, inputs=([alpha],))
    assert gx[:2] == pytest.approx([peak, trough], abs=5.1e-5)
    assert np.mean(gx[2:]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("g", "expected_gx"), [(0.5, 0.499166667), (-0.5, -0.500833333)])
def test_vector_ewgs(g, expected_gx):
    """l = -1, u = 1, four levels: x = .3 sits .01667 of the range below level 2/3."""
    _, gx, _, _ = run(Ewgs(delta=0.1), [0.3], [2 / 3], 2, [g], zero=-0.5)
    assert gx == pytest.approx([expected_gx], rel=1e-8)


def test_vector_ewgs_two_levels():
    _, gx, _, _ = run(Ewgs(delta=1e-3), [0.3], [2.0], 1, [0.5], zero=-0.5)
    assert gx == pytest.approx([0.499825], rel=1e-8)


@pytest.mark.parametrize(
    ("x", "b", "k", "dx", "db", "loss"),
    [
        (0.33, 0.0, 4.0, 0.848, -0.0296725, 0.00192),
        (0.33, 0.5, 4.0, 0.9568774, -0.0293052, 0.001172041),
        (0.33, 1.0, 4.0, 1.0627622, -0.0289379, 0.000607739),
        (0.40, 0.5, 8.0, 1.2261544, 0.0439759, 0.001511016),
        (-0.07, 0.75, 5.0, 0.7264231, 0.0361560, 0.000371396),
    ],
)
def test_vector_pege(x, b, k, dx, db, loss):
    """s = .25, lam = .3, g = .8; finite differences of the surrogate agree with these numbers."""
    rule, lam = Pege(), 0.3
    at, theta = (tensor([v], dtype=torch.float64, requires_grad=True) for v in (x, b))
    scale, sharpness, pull = (tensor([v], dtype=torch.float64) for v in (0.25, k, 2 * lam))
    y = FakeQuantize.apply(at, scale, 0.0, None, Grid(4), True, 1.0, True, False, rule, theta, sharpness, pull)
    y.backward(tensor([0.8], dtype=torch.float64))
    assert at.grad.item() == pytest.approx(dx, rel=2e-7)
    assert theta.grad.item() == pytest.approx(db, rel=2e-6)
    spec = spec_of("tensor")
    q = FakeQuantizer(spec, Granularity("tensor"), Pege(theta="channel"), shape=(1, 1), dtype=torch.float64)
    q.theta.data.fill_(b)
    q.sharpness.fill_(k)
    q.lam.fill_(lam)
    got = q.estimator.penalty(q, at.detach().reshape(1, 1), scale, 0.0)
    assert got.item() == pytest.approx(loss, rel=1e-6)


def test_vector_pege_replace():
    inputs = ([1.0, 0.0, 1.0], [0.05])
    x, g = [0.3, -0.6, 0.9], [0.1, 0.2, -0.3]
    rule = PegeReplace(lam=0.025)
    at = tensor(x, dtype=torch.float64, requires_grad=True)
    leaves = [tensor(v, dtype=torch.float64) for v in inputs]
    y = FakeQuantize.apply(
        at, tensor([0.5], dtype=torch.float64), 0.0, None, Grid(4), True, 1.0, True, True, rule, *leaves
    )
    y.backward(tensor(g, dtype=torch.float64))
    assert y.tolist() == [0.5, -0.6, 1.0]
    assert at.grad.tolist() == pytest.approx([0.09, 0.2, -0.305])


# --- the surroundings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, k in CASES if k in ("channel", "group", "tensor")])
def test_evaluation_is_hard_and_training_too_unless_the_method_blends(method, kind):
    q, x = quantizer_of(method, kind)
    hard = q.eval()(x)
    assert torch.equal(hard, q.on_grid(x))
    assert torch.equal(q.train()(x), hard) == (not fact(method, "SOFT", False))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
@pytest.mark.parametrize(("method", "kind"), COMPILED)
def test_compile_equals_eager_and_schedules_do_not_recompile(method, kind):
    q, x = quantizer_of(method, kind)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(q, fullgraph=True, backend=count)
    g = torch.randn_like(x)
    wrt = (x, *q.parameters())
    for step in range(3):
        for i, name in enumerate(q.estimator.schedules()):
            q._buffers[name].fill_(0.1 + 0.2 * step + 0.05 * i)
        if "step" in q._buffers:
            q.step.fill_(step)
        want, got = q(x), compiled(x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, wrt, g), torch.autograd.grad(want, wrt, g))
    assert count.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
@pytest.mark.parametrize(("method", "kind"), COMPILED)
def test_compiled_where_no_gradient_is_wanted(method, kind):
    """Dynamo traces autograd functions another way there."""
    q, x = quantizer_of(method, kind)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(q, fullgraph=True, backend="eager")(x), q(x))


@pytest.mark.parametrize("method", ESTIMATORS)
def test_autocast_changes_nothing_for_float_tensors(method):
    q, x = quantizer_of(method, kinds_of(method)[0])
    g, results = torch.randn_like(x), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = q(x)
        results.append((y, *torch.autograd.grad(y, (x, *q.parameters()), g)))
    assert results[1][0].dtype == torch.float32
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m, k in CASES if k in ("token", "static")])
def test_autocast_activations_keep_bfloat16(method, kind):
    """Under autocast a layer's input is bfloat16 while the quantizer's state is float32."""
    q, x = quantizer_of(method, kind)
    x = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in q.parameters())


def test_unknown_names():
    with pytest.raises(ValueError, match=r"QuantConfig.method: .*got 'pegee'. Did you mean method 'pege'"):
        build_estimator("pegee")
    with pytest.raises(ValueError, match=r"options of method 'ewgs': .*got 'dleta'. Did you mean option 'delta'"):
        build_estimator("ewgs", {"dleta": 1})
    with pytest.raises(ValueError, match=r"options of method 'stochastic': .*\(none\), got 'delta'"):
        build_estimator("stochastic", {"delta": 1})
    mine = Ewgs(0.5)
    assert build_estimator(mine) is mine


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ewgs(delta=-1), "ewgs.delta: expected a number >= 0"),
        (lambda: Dsq(ceiling=1.0), "0 < floor <= initial <= ceiling < 1"),
        (lambda: Dsq(alpha=1.0), r"dsq.alpha: expected values in \(0, 1\)"),
        (lambda: Pege(theta="elements"), "Did you mean theta 'element'"),
        (lambda: Pege(theta_dtype="int8"), "Did you mean dtype 'uint8'"),
        (lambda: Pege(initial=1.5), r"pege.initial: expected a number in \[0, 1\]"),
        (lambda: Pege(sharpness=0.0), "pege.sharpness: expected values above 0"),
        (lambda: PegeReplace(share="all"), "pege_replace.share: expected a number or a mapping"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_pege_budget_picks_the_finest_that_fits():
    rows, scales = {"a": (8, 256), "b": (4, 128)}, {"a": (8, 1), "b": (4, 4)}
    need = {"element": 8 * 256 + 4 * 128, "group": 16 * (8 * 4 + 4 * 4), "channel": 16 * 12}
    for name, limit in need.items():
        assert Pege(theta="auto", theta_bytes=limit).fit(rows, scales).theta == name
    assert Pege(theta="auto").fit(rows, scales).theta == "element"
    assert Pege(theta="auto", theta_dtype="float32", theta_bytes=5000).fit(rows, scales).theta == "group"
    with pytest.raises(ValueError, match=r"pege.theta_bytes: .*channel 192 bytes.*Raise theta_bytes"):
        Pege(theta="auto", theta_bytes=191).fit(rows, scales)
    with pytest.raises(ValueError, match="what theta='group' takes"):
        Pege(theta="group", theta_bytes=need["group"] - 1).fit(rows, scales)
