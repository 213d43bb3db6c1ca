"""A learned sharpness of PEGE's surrogate."""

from __future__ import annotations

import pytest
import torch
from torch import nn, tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_quant.estimators import FakeQuantize
from lightning_quant.estimators.pege import Pege
from lightning_quant.grid import Grid
from tests.loop import Run, check_folded, check_run
from tests.test_estimators import DTYPES, LAM, check, quantizer_of


def learned(**options):
    return Pege(**{"sharpness": "learned", "lam": LAM, "initial": 0.5, **options})


def scattered(q):
    """Each k its own, in and at the ends of its domain."""
    q.sharpness.data.copy_(torch.linspace(2, 8, q.sharpness.numel()).reshape(q.sharpness.shape))
    return q


@pytest.mark.parametrize(
    ("x", "b", "k", "turn"),
    [
        (0.33, 0.0, 4.0, 0.0),
        (0.33, 0.5, 4.0, -0.0230518),
        (0.33, 1.0, 4.0, -0.0461036),
        (0.40, 0.5, 8.0, 0.0138743),
        (-0.07, 0.75, 5.0, 0.0259358),
    ],
)
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_vector(x, b, k, turn, lam):
    """s = .25, g = .8: g_k = s (g + 2 lam e) dF/dk, with e of the vectors' L_prog = .3 e^2."""
    at, theta, sharpness = (tensor([v], dtype=torch.float64, requires_grad=True) for v in (x, b, k))
    scale, pull = (tensor([v], dtype=torch.float64) for v in (0.25, 2 * lam))
    y = FakeQuantize.apply(at, scale, 0.0, None, Grid(4), True, 1.0, True, False, learned(), theta, sharpness, pull)
    y.backward(tensor([0.8], dtype=torch.float64))
    u = x / 0.25
    r = u - torch.tensor(u).floor().item() - 0.5
    f = u + b * ((torch.tanh(tensor(k * r)) / (2 * torch.tanh(tensor(k / 2)))).item() - r)
    error = 0.25 * (f - round(u))
    assert sharpness.grad.item() == pytest.approx(0.25 * (0.8 + 2 * lam * error) * turn, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["channel", "group", "tensor", "token", "static"])
@pytest.mark.parametrize("theta", ["group", "channel", "element"])
def test_backward_is_the_stated_formula(theta, kind, dtype):
    q, x = quantizer_of(learned(theta=theta, theta_dtype="float32"), kind, dtype)
    check("pege", scattered(q), x)


@pytest.mark.parametrize("k", [2.3, 3.7, 5.1, 8.0])
def test_clipped_values_have_no_gradient_whatever_the_sharpness(k):
    """Rounding must not let the pull reach them."""
    q, x = quantizer_of(Pege(sharpness=k, lam=LAM, initial=0.5), "channel")
    (gx,) = torch.autograd.grad(q(x).sum(), x)
    outside = (x / q.scale > 7) | (x / q.scale < -8)
    assert outside.any()
    assert (gx[outside] == 0).all()
    assert (gx[~outside] != 0).all()


@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
def test_uint8_theta_has_a_sharpness_per_channel(kind):
    q, x = quantizer_of(learned(theta="element"), kind, torch.float64)
    assert q.theta.dtype == torch.uint8
    assert q.sharpness.shape == (4, 1)
    check("pege", scattered(q), x)
    assert q.sharpness.grad.abs().min() > 0


def test_shapes_and_learning_rates():
    shapes = {"group": (4, 2), "channel": (4, 1), "element": (4, 1)}
    for theta, shape in shapes.items():
        q, _ = quantizer_of(learned(theta=theta, theta_dtype="float32", state_lr=3.0), "channel")
        assert q.sharpness.shape == shape
        assert q.estimator.learned(q) == {"theta": 3.0, "sharpness": 3.0}
        assert (q.sharpness == 4).all()
    q, _ = quantizer_of(learned(initial_sharpness=2.5), "static")
    assert q.sharpness.shape == (128,)
    assert (q.sharpness == 2.5).all()
    q, _ = quantizer_of(learned(theta="element"), "channel")
    assert set(q.estimator.learned(q)) == {"sharpness"}


def test_a_scheduled_sharpness_stays_one_number_without_a_gradient():
    q, x = quantizer_of(Pege(initial=0.5), "channel")
    assert q._buffers["sharpness"].shape == ()
    assert set(q.estimator.schedules()) == {"lam", "sharpness"}
    assert set(learned().schedules()) == {"lam"}
    q(x).sum().backward()
    assert set(q.estimator.learned(q)) == {"theta"}


def test_zero_b_starts_at_the_straight_through_estimator():
    """Then k has no gradient; it gets one as soon as b leaves 0."""
    q, x = quantizer_of(learned(initial=0.0, lam=0.0), "channel", torch.float64)
    q.theta.data.zero_()
    gx, gk = torch.autograd.grad(q(x).sum(), (x, q.sharpness))
    assert set(gx.unique().tolist()) == {0.0, 1.0}
    assert not gk.any()
    q.theta.data.fill_(0.01)
    assert torch.autograd.grad(q(x).sum(), q.sharpness)[0].all()


def test_projection_keeps_k_in_its_domain():
    q, _ = quantizer_of(learned(), "channel")
    q.sharpness.data.copy_(tensor([[1.0, 3.0], [9.0, 8.0], [2.0, -5.0], [7.9, 2.1]]))
    q.theta.data.fill_(2.0)
    q.estimator.project(q)
    torch.testing.assert_close(q.sharpness.data, tensor([[2.0, 3.0], [8.0, 8.0], [2.0, 2.0], [7.9, 2.1]]))
    assert (q.theta == 1).all()
    assert q.estimator.metrics(q)["sharpness"].item() == pytest.approx(q.sharpness.mean().item())


def test_budget_counts_the_sharpness_too():
    rows, scales = {"a": (8, 256)}, {"a": (8, 1)}
    need = {"element": 8 * 256 + 16 * 8, "group": 2 * 16 * 8 * 4, "channel": 2 * 16 * 8}
    for name, limit in need.items():
        assert learned(theta="auto", theta_bytes=limit).fit(rows, scales).theta == name
    assert learned(theta="auto", theta_bytes=need["element"] - 1).fit(rows, scales).theta == "group"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharpness": "learnt"}, r"pege.sharpness: expected a number or a mapping"),
        ({"initial_sharpness": 1.0}, r"pege.initial_sharpness: expected a number in \[2, 8\], got 1.0"),
        ({"initial_sharpness": 9.0}, r"pege.initial_sharpness: expected a number in \[2, 8\], got 9.0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Pege(**options)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
@pytest.mark.parametrize("kind", ["group", "static"])
def test_compile_equals_eager_while_k_moves(kind):
    q, x = quantizer_of(learned(), kind)
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(q, fullgraph=True, backend=count)
    wrt = (x, *q.parameters())
    for k in (2.0, 4.0, 8.0):
        q.sharpness.data.fill_(k)
        want, got = q(x), compiled(x)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(want.sum(), wrt))
    assert count.frame_count == 1


@pytest.mark.parametrize("theta", ["group", "element"])
def test_training(theta, tmp_path):
    more = {"theta": theta, "sharpness": "learned", "initial": 0.25, "calibration": 3}
    run = check_run(lambda: Run("pege", "w3a8-channel-static", **more))
    k = run.model[0].weight_quant.sharpness
    assert isinstance(k, nn.Parameter)
    assert not torch.equal(k, torch.full_like(k, 4.0))
    assert (k.min() >= 2) & (k.max() <= 8)
    assert "sharpness" in run.controller.metrics()
    check_folded(Run("pege", "w3a16-channel", **more).steps(0, 4), tmp_path / "out")
