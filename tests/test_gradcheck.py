"""Where a method's gradient is the derivative of a smooth stand-in, the stand-in is written down and differentiated.

Each stand-in is a torch function of the paper's formula.  ``gradcheck`` compares its autograd derivative with finite
differences in float64, then our backward is compared with that derivative.  The bin of a value and the code it got
are constants, so that points keep their distance from the edges of bins.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.autograd import gradcheck

from lightning_quant.estimators.dsq import Dsq
from lightning_quant.estimators.ewgs import Ewgs
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.pege import Pege
from lightning_quant.estimators.seq import Seq
from lightning_quant.estimators.ste import Ste
from lightning_quant.estimators.tqt import Tqt
from lightning_quant.granularity import Granularity
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_weight
from lightning_quant.scheme import TensorSpec

F64 = torch.float64


def points(step, low, high, zero=0.0, n=60):
    """Values in and beyond the range whose place in their bin is .1 to .4 or .6 to .9, so that no edge is near."""
    generator = torch.Generator().manual_seed(7)
    bins = torch.randint(math.floor(low) - 2, math.ceil(high) + 2, (n,), generator=generator)
    place = 0.1 + 0.3 * torch.rand(n, generator=generator, dtype=F64)
    place = place + 0.5 * torch.randint(0, 2, (n,), generator=generator)
    return ((bins + place - zero) * step)[None]


def leaf(value):
    return torch.as_tensor(value, dtype=F64).clone().requires_grad_()


def build(rule, x, *, bits=4, granularity="tensor", **more):
    spec = resolve_weight(TensorSpec(bits, True, granularity, **more), True, rule)
    return FakeQuantizer(spec, Granularity(granularity, 0, spec.group_size or 0), rule, shape=x.shape, dtype=F64)


def compare(q, x, names, stand_in, values, factor=None):
    """Autograd of the stand-in is right, and is what the quantizer's backward gives."""
    leaves = [leaf(x), *map(leaf, values)]
    assert gradcheck(stand_in, leaves, eps=1e-7, atol=1e-6)
    for name, value in zip(names, values, strict=True):
        q._parameters[name].data.copy_(torch.as_tensor(value, dtype=F64).expand_as(q._parameters[name]))
    q.ready = True
    at, g = leaf(x), torch.linspace(-1, 1, x.numel(), dtype=F64).reshape(x.shape)
    got = torch.autograd.grad(q(at), (at, *(q._parameters[n] for n in names)), g)
    want = torch.autograd.grad(stand_in(*leaves), leaves, g)
    scaled = [t * (factor or {}).get(n, 1.0) for n, t in zip(names, want[1:], strict=True)]
    for a, b in zip(got, (want[0], *scaled), strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-9, atol=1e-11)
    return want


# --- DSQ


def soft_staircase(x, lower, upper, alpha, bits):
    """Q_S of Gong et al.: l, u outside, else l + delta (i + (phi + 1) / 2)."""
    steps = 2**bits - 1
    delta = (upper - lower) / steps
    t = (x - lower) / delta
    i = t.detach().floor().clamp(0, steps - 1)
    k = torch.log(2 / alpha - 1)
    phi = torch.tanh(k * (t - i - 0.5)) / (1 - alpha)
    inside = lower + delta * (i + (phi + 1) / 2)
    return torch.where(t < 0, lower.expand_as(x), torch.where(t > steps, upper.expand_as(x), inside))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.45])
def test_dsq_is_the_derivative_of_its_soft_staircase(alpha, bits):
    step = 0.3
    x = points(step, 0, 2**bits - 1) - 1.0
    q = build(Dsq(), x, bits=bits, range="bounds", learn_scale=True)
    ends = (-1.0, -1.0 + step * (2**bits - 1))
    compare(q, x, ("lower", "upper", "alpha"), lambda *t: soft_staircase(*t, bits), (*ends, alpha))


# --- PEGE


def surrogate(x, b, k, step, low, high):
    """F in real units: the mix of the identity and a tanh staircase, constant outside."""
    u = (x / step).clamp(low, high)
    i = u.detach().floor().clamp(low, high - 1)
    r = u - i - 0.5
    return step * (u + b * (torch.tanh(k * r) / (2 * torch.tanh(k / 2)) - r))


@pytest.mark.parametrize("lam", [0.0, 0.25])
@pytest.mark.parametrize(("b", "k"), [(0.0, 4.0), (0.5, 2.0), (1.0, 4.0), (0.75, 8.0)])
def test_pege_is_the_derivative_of_its_surrogate_and_of_the_progressive_loss(b, k, lam):
    """y = F + stopgrad(Q - F), and lam ||F - Q||^2 beside the loss; x, b and a learned k."""
    step = 0.3
    x = points(step, -8, 7)
    q = build(Pege(theta="channel", sharpness="learned", lam=lam), x, learn_scale=False)
    q.scale.fill_(step)
    q.lam.fill_(lam)
    q.ready = True
    q.theta.data.fill_(b)
    q.sharpness.data.fill_(k)
    leaves = [leaf(x), leaf(b), leaf(k)]
    assert gradcheck(lambda *t: surrogate(*t, step, -8, 7), leaves, eps=1e-7, atol=1e-6)
    g, f = torch.linspace(-1, 1, x.numel(), dtype=F64)[None], surrogate(*leaves, step, -8, 7)
    hard = (x / step).round().clamp(-8, 7) * step
    want = torch.autograd.grad((g * f).sum() + lam * (f - hard).square().sum(), leaves)
    at = leaf(x)
    got = torch.autograd.grad(q(at), (at, q.theta, q.sharpness), g)
    for a, w in zip(got, want, strict=True):
        torch.testing.assert_close(a, w.reshape(a.shape), rtol=1e-9, atol=1e-11)
    assert (got[2] == 0).all() == (b == 0)


# --- straight-through with learned steps: inside the range y = x + s c, with c = round(x/s) - x/s held constant


def straight_through(x, step, low, high, zero=0.0, reach=0.0):
    """The stand-in around these values: inside x plus a multiple of the step, outside the outermost level."""
    u = x / step + zero
    code = u.round().clamp(low, high)
    inside = (u >= low - reach) & (u <= high + reach)
    return lambda at, s, offset=0.0: torch.where(inside, at + s * (code - u), s * (code - zero) + offset)


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
def test_lsq_is_the_derivative_of_its_stand_in(bits):
    step, zero = 0.3, -0.5 if bits == 1 else 0.0
    low, high = {1: (-1, 0), 1.58: (-1, 1)}.get(bits) or (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    x = points(step, low, high, zero)
    q = build(Lsq(), x, bits=bits, learn_scale=True)
    factor = 1 / math.sqrt(x.numel() * max(high, 1))
    compare(q, x, ("scale",), straight_through(x, step, low, high, zero), (step,), {"scale": factor})


def test_lsq_plus_is_the_derivative_of_its_stand_in():
    step, beta = 0.3, -0.7
    x = points(step, 0, 7) + beta
    q = build(Ste(), x, bits=3, range="offset", learn_scale=True)
    factor = 1 / math.sqrt(x.numel() * 7)
    stand_in = straight_through(x - beta, step, 0, 7)
    compare(q, x, ("scale", "offset"), stand_in, (step, beta), {"scale": factor, "offset": factor})


def test_tqt_is_the_derivative_of_its_stand_in():
    """The rounding up is taken out: s = s0 exp(ln 2 (t - t0)) has the derivative that passes it unchanged."""
    start, step = 1.3, 2.0**2 / 8
    x = points(step, -8, 7)
    q = build(Tqt(), x, learn_scale=True, range="log2")
    fixed = straight_through(x, step, -8, 7, reach=0.5)
    compare(q, x, ("log2_threshold",), lambda a, t: fixed(a, step * torch.exp(math.log(2) * (t - start))), (start,))


@pytest.mark.parametrize(("bits", "n", "shift"), [(1.58, 1.5, 0.0), (2, 2.0, 0.5)])
def test_seq_is_the_derivative_of_its_stand_in(bits, n, shift):
    """In alpha: inside .99 alpha y = w + alpha c, outside the outermost level; the scale held is alpha / n."""
    alpha = 0.8
    x = points(alpha / n, -2, 1.5, shift)
    q = build(Seq(), x, bits=bits)
    part = x / alpha
    level = ((part.clamp(-0.99, 0.99) * n - shift).round() + shift) / n

    def stand_in(w, s):
        return torch.where(part.abs() <= 0.99, w + n * s * (level - part), n * s * level)

    assert 0 < (part.abs() > 0.99).sum() < part.numel()
    compare(q, x, ("scale",), stand_in, (alpha / n,), {"scale": 1 / math.sqrt(x.numel())})


# --- identities between methods


def both(first, second, x, names=(), **more):
    """Gradients of x (and of the scale) under two methods on the same grid."""
    found = []
    for rule in (first, second):
        q = build(rule, x, **more)
        q.fit_range(0.7 * x)
        for name, schedule in rule.schedules().items():
            q._buffers[name].fill_(schedule(0, 100))
        at = leaf(x)
        g = torch.linspace(-1, 1, x.numel(), dtype=F64).reshape(x.shape)
        found.append(torch.autograd.grad(q(at), (at, *(q._parameters[n] for n in names)), g))
    return found


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.5])
def test_pege_with_b_1_is_dsq(alpha, granularity):
    rule = Pege(theta="channel", initial=1.0, lam=0.0, sharpness=math.log(2 / alpha - 1))
    mine, theirs = both(rule, Dsq(alpha=alpha), points(0.3, -8, 7), ("scale",), granularity=granularity)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # scheduled scalars are float32


def test_ewgs_with_delta_0_is_straight_through():
    for names, learn in (((), False), (("scale",), True)):
        mine, theirs = both(Ewgs(delta=0.0), Ste(), torch.randn(3, 40, dtype=F64), names, learn_scale=learn)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", ["group", "channel", "tensor"])
def test_a_theta_per_element_tied_over_a_group_is_a_theta_per_group(kind):
    """The group's gradient is the sum of its elements', and the input's is the same."""
    x = torch.randn(3, 128, dtype=F64)
    size = 64 if kind == "group" else None
    found = {}
    for theta in ("element", "group"):
        rule = Pege(theta=theta, theta_dtype="float32")
        q = build(rule, x, granularity=kind, group_size=size, learn_scale=False)
        q.fit_range(0.7 * x)
        q.lam.fill_(0.25)
        b = torch.linspace(0, 1, 6, dtype=F64).reshape(3, 2)
        q.theta.data.copy_(b if theta == "group" else b.repeat_interleave(64, dim=1))
        at = leaf(x)
        found[theta] = torch.autograd.grad(q(at), (at, q.theta), torch.cos(x))
    torch.testing.assert_close(found["element"][0], found["group"][0], rtol=1e-12, atol=1e-14)
    summed = found["element"][1].reshape(3, 2, 64).sum(dim=-1)
    torch.testing.assert_close(summed, found["group"][1], rtol=1e-12, atol=1e-14)


def test_compare_sees_a_wrong_gradient():
    step = 0.3
    x = points(step, -8, 7)
    with pytest.raises(AssertionError):
        compare(build(Lsq(), x), x, ("scale",), straight_through(x, step, -8, 7), (step,))


def test_points_lie_on_both_sides_of_the_range_and_off_the_edges():
    x = points(1.0, -8, 7)
    assert x.min() < -8
    assert x.max() > 7
    place = x - x.floor()
    assert ((place - 0.5).abs() > 0.09).all()
    assert ((place - 0.5).abs() < 0.41).all()
    assert tensor(x.shape).tolist() == [1, 60]
