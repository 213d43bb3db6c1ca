"""Dampening and freezing of oscillating weights: hand values, state over steps, frozen weights under a moving scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant import QuantConfig
from lightning_quant.attach import attach
from lightning_quant.errors import AttachError
from lightning_quant.estimators import FakeQuantize
from lightning_quant.estimators.dampen import Dampen
from lightning_quant.estimators.freeze import FROZEN, UNSEEN, Freeze
from lightning_quant.estimators.lsq import Lsq
from lightning_quant.estimators.pege import Pege
from lightning_quant.grid import Grid
from tests.loop import Run, check_folded, check_run, convolutional, mlp
from tests.oracle.freeze import track
from tests.test_estimators import check, quantizer_of, run

LAM = 2.0**-3

# --- dampening ------------------------------------------------------------------------------------------------------


def test_vector_dampen():
    """s = .5, lam = .25: the pull is 2 * .25 * (w - Q(w)), and nothing beyond the range of [-4, 3.5]."""
    x, g = [0.3, -0.6, 0.9, 3.6, -9.0], [0.1, 0.2, -0.3, 1.0, 1.0]
    y, gx, _, _ = run(Dampen(lam=0.25), x, [0.5], 4, g, inputs=(0.5,))
    assert y == [0.5, -0.5, 1.0, 3.5, -4.0]
    assert gx == pytest.approx([0.1 - 0.1, 0.2 - 0.05, -0.3 - 0.05, 0, 0])


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
def test_dampen_is_the_pull_of_pege_without_a_surrogate(kind, learn):
    grads = []
    for rule in (Dampen(lam=LAM), Pege(theta="channel", lam=LAM, initial=0.0)):
        torch.manual_seed(1)
        q, x = quantizer_of(rule, kind, torch.float64, learn=learn)
        if "theta" in q._parameters:
            q.theta.data.zero_()
        g = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
        y = q(x)
        wrt = (x, q.scale) if learn else (x,)
        grads.append((y.detach(), *torch.autograd.grad(y, wrt, g)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-14, atol=1e-14)


def test_gradient_is_that_of_the_logged_term():
    q, x = quantizer_of(Dampen(lam=LAM), "group", torch.float64, learn=False)
    q.measuring = True
    q(x).backward(torch.zeros_like(x))
    inside = (x.detach() == x.detach().reshape(4, 4, 32).clamp(*_ends(q)).reshape(4, 128)).double()
    error = (x.detach() - q.on_grid(x)) * inside
    torch.testing.assert_close(x.grad, 2 * LAM * error)
    assert q.measured["progressive_loss"].item() == pytest.approx(LAM * error.square().sum().item())


def _ends(q):
    return -8 * q.scale.unsqueeze(-1), 7 * q.scale.unsqueeze(-1)


def test_only_weights_are_dampened():
    assert isinstance(Dampen().role(False), Lsq)
    assert Dampen().role(True) == Dampen()
    whole = Run("dampen", "w4a8-channel-static", lam=0.5, total=10).steps(0, 3)
    assert "lam" not in whole.model[0].input_quant._buffers
    assert whole.controller.values()["lam"] == 0.5


def test_default_lam_waits_and_then_rises_to_its_end():
    lam = Dampen().schedules()["lam"]
    assert [lam(step, 100) for step in (0, 30, 65, 100)] == pytest.approx([0, 0, 5e-3, 1e-2])
    assert Dampen().needs_bins
    assert not Dampen(lam=0.0).needs_bins


def test_dampened_weights_come_to_lie_on_their_levels():
    distances = []
    for lam in (0.0, 3.0):
        whole = Run("dampen", "w4a16-channel", lam=lam, total=60).steps(0, 60)
        layer = whole.model[0]
        low, high = (end * layer.weight_quant.scale for end in (-8, 7))
        w = layer.weight.clamp(low, high)
        distances.append((w - layer.weight_quant.on_grid(w)).square().mean().item())
    assert distances[1] < 0.2 * distances[0]


# --- freezing: the count --------------------------------------------------------------------------------------------


def freezer(momentum=0.1, threshold=1.0, shape=(1, 4), dtype=torch.float32, **more):
    """A quantizer with scale 1."""
    q, _ = quantizer_of(Freeze(threshold, momentum), "channel", dtype, learn=False, shape=shape, **more)
    q.scale.fill_(1.0)
    q.threshold.fill_(threshold)
    return q


def drive(q, latent):
    """Hand a weight's latent values to the method as an optimizer would."""
    weight = tensor(latent).reshape(q.shape).to(q.dtype)
    q.estimator.project(q, weight)
    return weight


def test_only_a_turn_counts():
    """By column: no change; on in one direction; there and back; there, rest, and back."""
    q = freezer()
    steps = [[0.2, 0, 0, 0], [-0.3, 1, 1, 1], [0.4, 2, 0, 1], [0.1, 3, 1, 0]]
    turns = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    f = np.zeros(4)
    for latent, turned in zip(steps, turns, strict=True):
        drive(q, latent)
        f = 0.1 * np.array(turned) + 0.9 * f
        np.testing.assert_allclose(q.frequency[0], f, rtol=1e-3)
    assert q.last_code.tolist() == [[8, 11, 9, 8]]  # counted from the lowest code, -8
    assert q.trend.tolist() == [[0, 1, 1, -1]]


def test_the_first_step_only_takes_note():
    q = freezer()
    assert (q.trend == UNSEEN).all()
    drive(q, [-7.0, 3, 0, 7])
    assert q.trend.tolist() == [[0, 0, 0, 0]]
    drive(q, [-6.0, 2, 0, 6])  # would be turns, were the codes' way from 0 taken for a change
    assert not q.frequency.any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("momentum", "threshold"), [(0.001, 1.0), (0.01, 1.0), (0.1, 0.15), (1.0, 0.5)])
def test_state_follows_its_definition_over_many_steps(bits, momentum, threshold):
    """Against a loop over one weight at a time; columns oscillate more and more often."""
    low, high, steps = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 200
    q = freezer(momentum, threshold, shape=(4, 16), bits=bits)
    codes = torch.randint(low, high, (4, 16)) + (torch.rand(steps, 4, 16) < torch.linspace(0, 0.9, 16)).long()
    places = [(i, j) for i in range(4) for j in range(16)]
    rest = {at: track(codes[:, *at].tolist(), momentum, threshold) for at in places}
    now = {}
    for t in range(steps):
        weight = drive(q, codes[t].tolist())
        for at in places:
            now[at] = next(rest[at], None) or now[at]
            frequency, average, stop = now[at]
            assert abs(frequency - threshold) > 5e-4  # float16 decides as float64 does
            assert q.frequency[at].item() == pytest.approx(frequency, rel=0.01, abs=1e-6)
            assert (q.trend[at] == FROZEN) == (stop is not None)
            if stop is None:
                assert q.drift[at].item() == pytest.approx(average - codes[t][at].item(), abs=3e-3)
            else:
                assert weight[at].item() == stop == q.last_code[at].item() + low
    stops = [stop for _, _, stop in now.values()]
    assert any(stop is not None for stop in stops) == (threshold < 1)
    assert any(stop is None for stop in stops)


def test_a_frozen_weight_stays_on_the_code_it_was_on_most():
    q = freezer(momentum=0.2, threshold=0.5, shape=(1, 2))
    seen = [[2.4, 0.0]] * 6 + [[2.6, 0.0], [2.4, 0.0]] * 6
    for latent in seen:
        weight = drive(q, latent)
    assert q.trend.tolist() == [[FROZEN, 0]]
    assert weight[0, 0] in (2, 3)
    stopped = weight[0, 0].item()
    for latent in ([-7.0, 1.0], [5.0, 0.0]):  # whatever an optimizer does to it
        weight = drive(q, latent)
        assert weight[0, 0] == stopped
        assert weight[0, 1] == latent[1]


@pytest.mark.parametrize(("momentum", "size"), [(0.01, 6), (0.001, 10)])
def test_bytes_per_weight(momentum, size):
    q = freezer(momentum, shape=(16, 32))
    own = [t for name, t in q.state_dict().items() if name != "scale"]
    assert sum(t.numel() * t.element_size() for t in own) == size * 16 * 32
    assert Freeze().holds_elements


# --- freezing: gradients and surroundings ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
def test_frozen_weights_get_no_gradient(kind):
    for dtype, learn in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
        q, x = quantizer_of(Freeze(), kind, dtype, learn=learn)
        q.trend.copy_(torch.where(torch.arange(x.numel()).reshape(x.shape) % 3 == 0, FROZEN, 1))
        check("freeze", q, x)
        assert (x.grad.flatten()[::3] == 0).all()


def test_frozen_codes_stay_and_levels_move_with_a_learned_scale():
    whole = Run("freeze", "w4a16-g8", threshold=0.0, momentum=0.5, lr=0.05, total=60, scale_lr=0.5)
    whole.steps(0, 30)
    quantizers = [layer.weight_quant for layer in whole.model if hasattr(layer, "weight_quant")]
    frozen = [q.trend == FROZEN for q in quantizers]
    assert all(f.any() for f in frozen)
    assert not all(f.all() for f in frozen)
    codes, scales = [q.last_code.clone() for q in quantizers], [q.scale.detach().clone() for q in quantizers]
    whole.steps(30, 60)
    for layer, mask, code, scale in zip((whole.model[0], whole.model[2]), frozen, codes, scales, strict=True):
        q = layer.weight_quant
        assert not torch.equal(q.scale, scale)
        assert torch.equal(q.last_code[mask], code[mask])
        assert torch.equal(q.stored(layer.weight)[0][mask].int(), code[mask].int() + q.low)
        assert torch.equal(layer.weight[mask], q.on_grid(layer.weight)[mask])
    assert 0 < whole.controller.metrics()["frozen"] < 1


def test_the_scale_of_frozen_weights_gets_the_gradient_of_scale_times_code():
    x = tensor([[2.0, 2.2]], dtype=torch.float64, requires_grad=True)
    scale = tensor([1.0], dtype=torch.float64, requires_grad=True)
    trend = tensor([[FROZEN, 0]], dtype=torch.int8)
    FakeQuantize.apply(x, scale, 0.0, None, Grid(4), True, 1.0, True, True, Freeze(), trend).sum().backward()
    assert x.grad.tolist() == [[0, 1]]
    assert scale.grad.item() == pytest.approx(2.0 + (2 - 2.2))


@pytest.mark.parametrize("scheme", ["w4a16-channel-asym", "w2a16-tensor", "nf4-g4", "w8a16"])
def test_frozen_values_are_levels_on_every_grid(scheme):
    whole = Run("freeze", scheme, threshold=0.0, momentum=0.5, lr=0.05, total=40, learn_scale=False).steps(0, 40)
    layer = whole.model[0]
    frozen = layer.weight_quant.trend == FROZEN
    assert frozen.any()
    assert torch.equal(layer.weight[frozen], layer.weight_quant.on_grid(layer.weight)[frozen])


def test_transposed_convolutions_and_momentum():
    make = lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01)  # noqa: E731
    whole = Run("freeze", "w2a8-channel", convolutional(), threshold=0.0, momentum=0.5, optimizer=make).steps(0, 20)
    layer = whole.model[2]
    frozen = layer.weight_quant.trend == FROZEN
    assert frozen.any()
    codes = layer.weight_quant.last_code.clone()
    whole.steps(20, 30)
    assert torch.equal(layer.weight_quant.last_code[frozen], codes[frozen])
    assert torch.equal(layer.weight[frozen], layer.weight_quant.on_grid(layer.weight)[frozen])


def test_a_cast_of_the_model_keeps_what_is_counted():
    q = freezer(momentum=0.5)
    for latent in ([0.0, 1, 2, 3], [1.0, 1, 2, 3], [0.0, 1, 2, 3]):
        drive(q, latent)
    codes, trend, frequency = q.last_code.clone(), q.trend.clone(), q.frequency.clone()
    q.to(torch.bfloat16)
    assert torch.equal(q.last_code, codes)
    assert torch.equal(q.trend, trend)
    torch.testing.assert_close(q.frequency.float(), frequency.float(), rtol=1e-2, atol=0)
    drive(q, [1.0, 1, 2, 3])
    assert q.frequency[0, 0] == 0.75


def test_threshold_falls_on_its_cosine():
    threshold = Freeze().schedules()["threshold"]
    assert [threshold(step, 100) for step in (0, 50, 100)] == pytest.approx([0.04, 0.025, 0.01])
    whole = Run("freeze", "w4a16-g8", total=10).steps(0, 6)
    assert whole.model[0].weight_quant.threshold.item() == pytest.approx(threshold(5, 10))


def test_without_freezing_it_is_lsq():
    freeze = Run("freeze", "w4a16-g8", total=20, threshold=1.0).steps(0, 20)
    assert freeze.losses == Run("lsq", "w4a16-g8", total=20).steps(0, 20).losses


def test_freezing_refuses_scales_that_follow_the_weights_and_sharded_weights(monkeypatch):
    spec = QuantConfig.parse("freeze", "w8a16").weight
    config = QuantConfig("freeze", replace(spec, dynamic=True), None)
    with pytest.raises(ValueError, match=r"weight: method 'freeze': expected dynamic=False, got dynamic=True"):
        attach(mlp(), config)
    whole = Run("freeze", "w8a16")
    assert whole.model[0].weight_quant.spec.dynamic is False
    monkeypatch.setattr(nn.Parameter, "to_local", lambda self: self, raising=False)
    with pytest.raises(AttachError, match="a whole weight for the state per element that freeze keeps"):
        whole.controller.begin(10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Freeze(threshold=1.5), r"freeze.threshold: expected values in \[0, 1\], got 1.5. 1 never freezes"),
        (lambda: Freeze(momentum=0.0), r"freeze.momentum: expected a number in \(0, 1\], got 0.0"),
        (lambda: Dampen(lam=-1.0), "dampen.lam: expected values >= 0, got -1.0"),
        (lambda: Dampen(lam="much"), "dampen.lam: expected a number or a mapping"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        ("dampen", "w4a16-g8", {"lam": 0.1}),
        ("dampen", "nf4-g4", {}),
        ("freeze", "w4a16-g8", {"threshold": 0.02, "momentum": 0.1}),
        ("freeze", "w4a8-channel-static", {}),
    ],
)
def test_short_run(method, scheme, options, tmp_path):
    whole = check_run(lambda: Run(method, scheme, lr=0.02, **options), drop=0.8)
    if "a8" not in scheme:
        check_folded(whole, tmp_path / "out")
