"""The controller: everything a pure function of the step; windows, coverage, state, metrics, and PEGE's loss."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lightning_quant.attach import quantizers
from lightning_quant.controller import QuantController
from lightning_quant.errors import CoverageError
from lightning_quant.schedule import Schedule
from lightning_quant.spec import LayerRule, QuantConfig
from tests import oracle
from tests.oracle.pege import surrogate

RAMP = {"curve": "cosine", "start": 0.0, "end": 0.5, "delay": 0.2}


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def controlled(method="pege", scheme="w4a16-g16", total=10, model=None, **options):
    controller = QuantController(QuantConfig.parse(method, scheme, **options))
    model = mlp() if model is None else model
    controller.prepare(model)
    controller.begin(total)
    return controller, model


def all_of(model, name):
    return [q._buffers[name] for _, q in quantizers(model) if name in q._buffers]


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("pege", "lam", {"lam": RAMP}),
        ("pege", "sharpness", {"sharpness": {"curve": "linear", "start": 2, "end": 8}}),
        ("pege_replace", "share", {}),
        ("pege_replace", "lam", {"lam": RAMP}),
        ("dsq", "alpha", {"alpha": {"curve": "hardness", "start": 0.2, "end": 0.02}}),
    ],
)
def test_buffers_are_a_pure_function_of_the_step(method, name, options):
    controller, model = controlled(method, "w4a8-g16", **options)
    schedule = controller.schedules[name]
    for step in (0, 3, 9, 2, 2, 10, 0):
        controller.on_step(step)
        buffers = all_of(model, name)
        assert len(buffers) == 4
        assert {b.item() for b in buffers} == {torch.tensor(schedule(step, 10)).item()}
        assert controller.values()[name] == schedule(step, 10)


def test_addresses_of_buffers_never_change():
    """A compiled graph keeps pointers: filling must be in place."""
    controller, model = controlled(lam=RAMP)
    before = [b.data_ptr() for b in all_of(model, "lam")]
    controller.on_step(5)
    assert [b.data_ptr() for b in all_of(model, "lam")] == before


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_loss_scale_multiplies_lam_alone(scale):
    controller, model = controlled(lam=0.25, sharpness=4.0)
    controller.on_step(0, loss_scale=scale)
    assert {b.item() for b in all_of(model, "lam")} == {0.125}
    assert {b.item() for b in all_of(model, "sharpness")} == {4.0}
    assert controller.values()["lam"] == 0.25


def test_step_counter_reaches_the_noise():
    controller, model = controlled("pege_replace")
    controller.on_step(7)
    assert {b.item() for b in all_of(model, "step")} == {7}
    assert {b.dtype for b in all_of(model, "step")} == {torch.int64}


def test_moving_schedules_need_the_length_before_the_first_step():
    controller = QuantController(QuantConfig.parse("pege", "w4a16-g16"))
    controller.prepare(mlp())
    with pytest.raises(ValueError, match="the number of optimizer steps of the run, got None"):
        controller.begin(None)
    controller, _ = controlled("pege", lam=0.1, total=None)
    controller.on_step(3)


def test_order_of_calls():
    with pytest.raises(RuntimeError, match=r"expected prepare\(model\) first, got no model"):
        QuantController(QuantConfig()).begin(10)
    with pytest.raises(ValueError, match="Did you mean method 'pege'"):
        QuantController(QuantConfig(method="pge"))


def test_preparing_again_keeps_the_quantizers():
    controller, model = controlled()
    before = [id(q) for _, q in quantizers(model)]
    report = controller.report
    assert controller.prepare(model) is report
    assert [id(q) for _, q in quantizers(model)] == before


# --- calibration window -----------------------------------------------------------------------------------------------


def test_micro_batches_equal_one_global_batch():
    """Ranges of an accumulated step are those of the whole batch, for each step of the window, then frozen."""
    start, data = mlp(), [torch.randn(8, 16) * (1 + i) for i in range(5)]
    ranges = []
    for parts in (1, 4):
        controller, model = controlled("ste", "w8a8-static", model=copy.deepcopy(start), calibration=3)
        history = []
        for step, batch in enumerate(data):
            for micro in batch.chunk(parts):
                controller.on_step(step, loss_scale=1 / parts)
                model(micro).sum().backward()
            controller.after_optimizer_step()
            history.append([q.running.tolist() for _, q in quantizers(model) if not q.is_weight][:1])
        ranges.append(history)
    assert ranges[0] == ranges[1]
    low, high = data[0].min().item(), data[0].max().item()
    assert ranges[0][0] == [[low, high]]
    assert ranges[0][1] == [
        pytest.approx([0.9 * low + 0.1 * data[1].min().item(), 0.9 * high + 0.1 * data[1].max().item()])
    ]
    assert ranges[0][2] != ranges[0][1]
    assert ranges[0][4] == ranges[0][3] == ranges[0][2]


def test_evaluation_in_the_window_is_not_observed():
    controller, model = controlled("ste", "w8a8-static", calibration=10)
    controller.on_step(0)
    model(torch.randn(4, 16))
    controller.after_optimizer_step()
    before = [q.running.tolist() for _, q in quantizers(model) if not q.is_weight]
    controller.on_eval()
    model.eval()(1000 * torch.randn(4, 16))
    controller.on_step(1)
    model.train()(torch.zeros(4, 16))
    controller.after_optimizer_step()
    after = [q.running.tolist() for _, q in quantizers(model) if not q.is_weight]
    assert after[0] == pytest.approx([0.9 * end for end in before[0]])


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_training_coverage_is_checked_once():
    controller, model = controlled("ste", "w8a16")
    controller.on_step(0)
    model[0](torch.randn(2, 16)).sum().backward()
    with pytest.raises(CoverageError, match=r"2.weight_quant: expected every quantizer to be called by a training"):
        controller.after_optimizer_step()
    controller, model = controlled("ste", "w8a16")
    model(torch.randn(2, 16))
    controller.after_optimizer_step()
    controller.after_optimizer_step()


class Fused(nn.Module):
    """In evaluation one kernel reads the raw weight, past the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return self.layer(x) if self.training else nn.functional.linear(x, self.layer.weight)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_evaluation_coverage_looks_at_evaluation_alone(steps):
    """However many training batches came before, a fast path that skips the quantizers is noticed."""
    model = Fused()
    controller, _ = controlled("ste", "w8a16", model=model)
    for step in range(steps):
        controller.on_step(step)
        model.train()(torch.randn(2, 16))
        controller.after_optimizer_step()
    controller.on_eval()
    with torch.no_grad():
        model.eval()(torch.randn(2, 16))
    with pytest.raises(CoverageError, match=r"layer.weight_quant: .*evaluation batch"):
        controller.after_eval_batch()


def test_coverage_off():
    controller, model = controlled("ste", "w8a16", coverage="off")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller.after_optimizer_step()
        controller.after_eval_batch()
    assert not caught
    assert not any(q.called for _, q in quantizers(model))


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_is_plain_and_carries_the_step():
    config = QuantConfig.parse("pege", "w4a16-g16", lam=RAMP, rules=[LayerRule("2", weight="w8")])
    controller, other = QuantController(config), QuantController(config)
    controller.prepare(mlp())
    controller.begin(10)
    controller.on_step(6)
    state = yaml.safe_load(yaml.safe_dump(controller.state_dict()))
    other.load_state_dict(state)
    assert other.step == 6


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("lsq", "w4a16-g16", {}), "method"),
        (("ste", "w3a16-g16", {}), "weight"),
        (("ste", "w4a16-g8", {}), "weight"),
        (("ste", "w4a8-g16", {}), "activation"),
        (("ste", "w4a16-g16", {"rules": [LayerRule("2", weight=None)]}), "rules"),
    ],
)
def test_another_grid_is_refused(change, key):
    method, scheme, options = change
    state = QuantController(QuantConfig.parse("ste", "w4a16-g16")).state_dict()
    other = QuantController(QuantConfig.parse(method, scheme, **options))
    with pytest.raises(ValueError, match=rf"QuantController state, {key}: expected the checkpoint's .*Resume with the"):
        other.load_state_dict(state)


def test_what_does_not_decide_the_grid_may_change():
    state = QuantController(QuantConfig.parse("ste", "w4a16-g16")).state_dict()
    other = QuantController(QuantConfig.parse("ste", "w4a16-g16", coverage="warn", scale_lr=1.0))
    other.load_state_dict({**state, "step": 7})
    assert other.step == 7


def test_another_version_is_refused():
    controller = QuantController(QuantConfig())
    with pytest.raises(ValueError, match="QuantController state: expected version 1, got 2"):
        controller.load_state_dict({**controller.state_dict(), "version": 2})


@pytest.mark.parametrize("theta", ["group", "element"])
def test_a_resumed_run_is_the_uninterrupted_one(theta):
    def run(controller, model, steps):
        torch.manual_seed(steps[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in steps:
            controller.on_step(step)
            optimizer.zero_grad()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            controller.before_optimizer_step()
            optimizer.step()
            controller.after_optimizer_step()

    start = mlp()
    settings = {"theta": theta, "lam": RAMP, "calibration": 4, "total": 8}
    controller, whole = controlled("pege", "w4a8-g16-static", model=copy.deepcopy(start), **settings)
    run(controller, whole, range(8))
    controller, first = controlled("pege", "w4a8-g16-static", model=copy.deepcopy(start), **settings)
    run(controller, first, range(3))
    saved = copy.deepcopy((first.state_dict(), controller.state_dict()))
    controller, second = controlled("pege", "w4a8-g16-static", model=mlp(), **settings)
    second.load_state_dict(saved[0])
    controller.load_state_dict(saved[1])
    run(controller, second, range(3, 8))
    for (name, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics():
    controller, model = controlled("pege", "w4a8-g16", lam=0.25, initial=0.5)
    state = {"lam", "sharpness", "theta", "theta_max", "scale_drift"}
    assert set(controller.metrics()) == state
    controller.on_step(0, measure=True)
    model(torch.randn(4, 16))
    metrics = controller.metrics()
    assert set(metrics) == {*state, "error", "clip", "input_error", "input_clip", "progressive_loss"}
    assert all(isinstance(v, float) for v in metrics.values())
    assert metrics["lam"] == 0.25
    assert metrics["theta"] == 0.5
    assert 0 < metrics["input_error"] < metrics["error"] < 0.1
    controller.on_step(1)
    assert not any(q.measuring for _, q in quantizers(model))


def test_progressive_loss_is_reported_in_the_loss_s_own_units():
    """A gradient scaler and accumulation change what the backward sees, not what is reported."""
    controller, model = controlled("pege", "w4a16-g16", lam=0.25)
    x, reported = torch.randn(4, 16), []
    for scale in (1.0, 65536.0 / 4, torch.tensor(0.25)):
        controller.on_step(0, loss_scale=scale, measure=True)
        model(x)
        reported.append(controller.metrics()["progressive_loss"])
    assert reported == pytest.approx([reported[0]] * 3)


# --- learned state after a step ---------------------------------------------------------------------------------------


def test_learned_state_is_brought_back_into_its_domain():
    controller, model = controlled("pege", "w4a16-g16")
    for _, q in quantizers(model):
        q.theta.data.copy_(torch.linspace(-1, 2, q.theta.numel()).reshape(q.theta.shape))
        q.scale.data[0] = -1.0
        q.called = True
    controller.after_optimizer_step()
    for _, q in quantizers(model):
        assert q.theta.min() == 0
        assert q.theta.max() == 1
        assert (q.scale[0] > 0).all()
    controller, model = controlled("dsq", "w4a16-g16", coverage="off")
    for (_, q), alpha in zip(quantizers(model), (-0.1, 0.9), strict=True):
        q.alpha.data.fill_(alpha)
    controller.after_optimizer_step()
    assert [round(q.alpha.item(), 6) for _, q in quantizers(model)] == [0.001, 0.5]


def uint8(**more):
    controller, model = controlled("pege", "w4a16-channel", theta="element", initial=0.5, uint8_lr=0.02, **more)
    layer = model[0]
    layer.weight.grad = torch.randn_like(layer.weight)
    model[2].weight.grad = torch.randn_like(model[2].weight)
    return controller, layer


def test_uint8_theta_takes_the_stated_step():
    """b <- b - lr * g_b / rms(g_b), g_b = s (g_x / D)(phi - r), rounded stochastically to 1/255."""
    controller, layer = uint8()
    q = layer.weight_quant
    assert q.theta.dtype == torch.uint8
    assert "theta" not in dict(q.named_parameters())
    before = q.theta.double().numpy()
    controller.on_step(3)
    controller.before_optimizer_step()
    x, g, s = (t.detach().double().numpy() for t in (layer.weight, layer.weight.grad, q.scale))
    _, slope, gap = surrogate(x, s, 0.0, -8, 7, before / 255, 4.0)
    g_b = g / slope * gap * s
    moved = before - 255 * 0.02 * g_b / np.sqrt(np.mean(g_b**2))
    want = np.clip(np.floor(moved + oracle.uniform(x.shape, 3, q.salt)), 0, 255)
    off = np.abs(q.theta.double().numpy() - want)
    assert off.max() <= 1  # float32 against float64 on the edge of a floor
    assert (off > 0).mean() < 0.01
    assert (q.theta.double().numpy() != before).mean() > 0.5


def test_uint8_theta_does_not_see_the_size_of_the_gradient():
    results = []
    for factor in (1.0, 4096.0):
        torch.manual_seed(0)
        controller, layer = uint8()
        layer.weight.grad *= factor
        controller.on_step(3)
        controller.before_optimizer_step()
        results.append(layer.weight_quant.theta)
    assert torch.equal(*results)


def test_uint8_theta_rounding_is_unbiased():
    controller, layer = uint8(total=400)
    q, drift = layer.weight_quant, 0.0
    for step in range(300):
        q.theta.fill_(128)
        controller.on_step(step)
        controller.before_optimizer_step()
        drift = drift + (q.theta.double() - 128) / 300
    x, g, s = (t.detach().double().numpy() for t in (layer.weight, layer.weight.grad, q.scale))
    _, slope, gap = surrogate(x, s, 0.0, -8, 7, 128 / 255, 4.0)
    g_b = g / slope * gap * s
    want = -255 * 0.02 * g_b / np.sqrt(np.mean(g_b**2))
    assert np.abs(drift.numpy() - want).max() < 0.5 / np.sqrt(300) * 5


def test_uint8_theta_survives_missing_and_infinite_gradients():
    controller, layer = uint8()
    layer.weight.grad[0, 0] = torch.inf
    controller.on_step(0)
    controller.before_optimizer_step()
    layer.weight.grad = None
    before = layer.weight_quant.theta.clone()
    controller.before_optimizer_step()
    assert torch.equal(layer.weight_quant.theta, before)


# --- PEGE: the closed form against the loss as it is written ----------------------------------------------------------


def written(x, scale, low, high, b, k, clips=True):
    """(y, squared error) through autograd: y = F + stopgrad(Q - F), error = F - Q with Q constant.

    A scale read off the data puts the largest value on the highest level: rounding aside, nothing is clipped.
    """
    u = x / scale
    if clips:
        u = u.clamp(low, high)
    r = u - u.detach().floor().clamp(max=high - 1) - 0.5
    surrogate = scale * (u + b * (torch.tanh(k * r) / (2 * torch.tanh(k / 2)) - r))
    hard = (scale * u.round()).detach()
    return surrogate + (hard - surrogate).detach(), (surrogate - hard).square()


def written_loss(model, x, target, lam, theta):
    """Task loss + lam * (sum over weights, mean over activations) of ||F - Q||^2, built from plain operations."""
    total = torch.zeros((), dtype=torch.float64)
    k = torch.tensor(4.0, dtype=torch.float64)
    for layer in (model[0], model[2]):
        q = layer.weight_quant
        scale = q.scale.detach().repeat_interleave(16, dim=1)
        b = q.theta.repeat_interleave(16, dim=1) if theta == "group" else q.theta.expand_as(layer.weight)
        weight, error = written(layer.weight, scale, -8, 7, b, k)
        total = total + lam * error.sum()
        scale = x.detach().abs().amax(dim=-1, keepdim=True) / 127
        x, error = written(x, scale, -128, 127, layer.input_quant.theta, k, clips=False)
        total = total + lam * error.mean()
        x = nn.functional.linear(x, weight, layer.bias)
        x = x.relu() if layer is model[0] else x
    return nn.functional.cross_entropy(x, target) + total


@pytest.mark.parametrize("theta", ["element", "group", "channel"])
@pytest.mark.parametrize(("micro_batches", "scaled"), [(1, False), (4, False), (1, True), (4, True)])
def test_pege_gradients_are_those_of_the_written_loss(theta, micro_batches, scaled):
    """Also summed over accumulated micro-batches, and under a loss scaler."""
    controller, model = controlled(
        "pege",
        "w4a8-g16",
        model=mlp(torch.float64),
        lam=0.125,
        theta=theta,
        theta_dtype="float32",
        learn_scale=False,
    )
    with torch.no_grad():
        for _, q in quantizers(model):
            q.theta.uniform_()
    x, target = torch.randn(16, 16, dtype=torch.float64), torch.randint(4, (16,))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        controller.on_step(0, loss_scale=scaler.get_scale() / micro_batches)
        scaler.scale(nn.functional.cross_entropy(model(part), wanted) / micro_batches).backward()
    if scaled:
        scaler.unscale_(optimizer)
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for part, wanted in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        (written_loss(model, part, wanted, 0.125, theta) / micro_batches).backward()
    assert any("theta" in n for n in got)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-10, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_pege_replace_pull_is_the_gradient_of_its_written_loss():
    options = {"lam": 0.125, "share": 0.5, "learn_scale": False}
    controller, model = controlled("pege_replace", "w4a16-g16", model=mlp(torch.float64), **options)
    layer = model[0]
    q = layer.weight_quant
    controller.on_step(4)
    y = q(layer.weight)
    g = torch.randn_like(y)
    y.backward(g)
    leaf = layer.weight.detach().clone().requires_grad_()
    scale = q.scale.repeat_interleave(16, dim=1)
    u = (leaf / scale).clamp(-8, 7)
    m = torch.tensor(oracle.uniform(leaf.shape, 4, q.salt) < 0.5)
    hard = (u.round() * scale).detach()
    blended = u * scale + (torch.where(m, hard, leaf) - u * scale).detach()
    ((g * blended).sum() + 0.125 * (m * (u * scale - hard)).square().sum()).backward()
    torch.testing.assert_close(layer.weight.grad, leaf.grad, rtol=1e-12, atol=1e-14)


def test_schedules_of_the_config_are_used():
    controller, _ = controlled("pege", lam=RAMP)
    assert controller.schedules["lam"] == Schedule(**RAMP)
