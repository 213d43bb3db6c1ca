"""Quantization delay: training is the float model's up to a step, and the quantized one's from there on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, AdamW

from lightning_quant.attach import attach, quant_layers, quantizers
from lightning_quant.controller import QuantController
from lightning_quant.estimators import ESTIMATORS
from lightning_quant.estimators.freeze import UNSEEN
from lightning_quant.schedule import delay_steps
from lightning_quant.spec import QuantConfig

OPTIONS = {"dorefa": {"gradient_bits": 4}, "pege": {"lam": 0.5}, "elq": {"beta": 0.5}, "ewgs": {"delta": 0.5}}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))


def controlled(method="lsq", scheme="w4a8-channel-static", total=20, model=None, **options):
    controller = QuantController(QuantConfig.parse(method, scheme, **{"delay": 3, **options}))
    model = net() if model is None else model
    controller.prepare(model)
    controller.begin(total)
    return controller, model.train()


def batch(step, rows=8):
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(step)) * (1 + step)


def run(controller, model, steps, optimizer=None):
    optimizer = SGD(model.parameters(), lr=0.02) if optimizer is None else optimizer
    for step in steps:
        controller.on_step(step)
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        controller.before_optimizer_step(optimizer)
        optimizer.step()
        controller.after_optimizer_step()


# --- the two phases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(ESTIMATORS))
def test_the_float_phase_of_every_method_is_float_training(method):
    scheme = ESTIMATORS[method].about.scheme.replace("a16", "a8")
    controller, model = controlled(method, scheme, **OPTIONS.get(method, {}))
    plain = net()
    for step in (0, 2):
        controller.on_step(step)
        model.zero_grad()
        plain.zero_grad()
        found, wanted = model(batch(step)), plain(batch(step))
        assert torch.equal(found, wanted)
        found.square().mean().backward()
        wanted.square().mean().backward()
        mine = dict(model.named_parameters())
        for name, p in plain.named_parameters():
            assert torch.equal(mine.pop(name).grad, p.grad), name
        for name, p in mine.items():
            assert p.grad is not None, name
            assert not p.grad.any(), name
    hard = model.eval()(batch(1))
    assert not torch.equal(hard, plain(batch(1)))
    controller.on_step(3)
    assert torch.equal(model(batch(1)), hard)
    if method not in ("inq", "elq"):  # their free weights are float
        assert not torch.equal(model.train()(batch(1)), plain(batch(1)))


def test_from_the_start_on_training_is_what_it_is_without_a_delay():
    controller, model = controlled("pege", "w4a8-channel", lam=0.25, initial=0.5)
    plain, without = controlled("pege", "w4a8-channel", lam=0.25, initial=0.5, delay=0)
    grads = []
    for control, module in ((controller, model), (plain, without)):
        for step in (0, 1, 2, 3) if control is controller else (3,):
            control.on_step(step)
            module.zero_grad()
            module(batch(3)).square().mean().backward()
            control.after_optimizer_step()
        grads.append({n: p.grad for n, p in module.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    assert any(g.any() for n, g in grads[0].items() if n.endswith("scale"))


def test_without_a_delay_there_is_no_trace_of_it():
    _, model = controlled(delay=0)
    assert not any("started" in q._buffers for _, q in quantizers(model))
    _, other = controlled()
    assert all(q.started.ndim == 0 for _, q in quantizers(other))
    assert other.state_dict().keys() == model.state_dict().keys()


def test_training_that_no_controller_drives_is_quantized():
    _, model = controlled()
    plain = net()
    attach(plain, QuantConfig.parse("lsq", "w4a8-channel-static"))
    assert torch.equal(model(batch(0)), plain(batch(0)))


def test_a_share_of_the_run():
    assert delay_steps(0.5, 7) == 4
    assert [delay_steps(0.1, n) for n in (10, 30, 70)] == [1, 3, 7]
    assert [delay_steps(d, None) for d in (0, 1, 12.0)] == [0, 1, 12]
    with pytest.raises(ValueError, match=r"QuantConfig.delay=0.1: expected the number of optimizer steps .*or give it"):
        controlled(delay=0.1, total=None)
    with pytest.warns(UserWarning, match=r"QuantConfig.delay: expected less than the run's 20 .*, got 20. Nothing"):
        controlled(delay=20)


# --- ranges -----------------------------------------------------------------------------------------------------------


def test_weight_ranges_are_those_of_the_weights_when_quantization_starts():
    controller, model = controlled(scheme="w4a16-channel")
    first = [layer.weight_quant.scale.clone() for _, layer in quant_layers(model)]
    run(controller, model, range(3))
    with torch.no_grad():
        for _, layer in quant_layers(model):
            layer.weight.mul_(3)
    assert all(torch.equal(a, model[i].weight_quant.scale) for a, i in zip(first, (0, 2, 4), strict=True))
    fresh = net()
    fresh.load_state_dict({n: p for n, p in model.state_dict().items() if "_quant" not in n})
    attach(fresh, QuantConfig.parse("lsq", "w4a16-channel"))
    controller.on_step(3)
    for (path, layer), (_, other) in zip(quant_layers(model), quant_layers(fresh), strict=True):
        assert torch.equal(layer.weight_quant.scale, other.weight_quant.scale), path
        layer.weight_quant.scale.data.mul_(2)
    controller.on_step(3)  # the step's next micro-batch
    controller.on_eval()
    controller.on_step(4)
    for (path, layer), (_, other) in zip(quant_layers(model), quant_layers(fresh), strict=True):
        assert torch.equal(layer.weight_quant.scale, 2 * other.weight_quant.scale), path


def test_evaluation_in_the_float_phase_rounds_the_weights_as_they_are():
    controller, model = controlled(scheme="w4a16-channel")
    controller.on_step(0)
    layer = model[0]
    before = layer.weight_quant.scale.clone()
    with torch.no_grad():
        layer.weight.mul_(3)
    controller.on_eval()
    assert torch.allclose(layer.weight_quant.scale, 3 * before)


@pytest.mark.parametrize(("delay", "calibration", "last"), [(3, 2, 4), (3, 0, 2), (0, 2, 1)])
def test_input_ranges_follow_the_data_through_delay_and_calibration(delay, calibration, last):
    controller, model = controlled("ste", delay=delay, calibration=calibration)
    history = []
    for step in range(8):
        run(controller, model, [step])
        history.append(model[0].input_quant.running.clone())
    moved = [step for step in range(1, 8) if not torch.equal(history[step], history[step - 1])]
    assert moved == list(range(1, last + 1))


# --- what waits -------------------------------------------------------------------------------------------------------


def test_nothing_pulls_before_the_start():
    ramp = {"curve": "linear", "start": 0.5, "end": 1.0}
    controller, model = controlled("pege", lam=ramp, sharpness={"curve": "linear", "start": 2, "end": 8})
    for step in (0, 2, 3, 5):
        controller.on_step(step)
        lam = 0.0 if step < 3 else 0.5 + 0.5 * step / 20
        assert controller.values()["lam"] == controller.metrics()["lam"] == pytest.approx(lam)
        assert [q.lam.item() for _, q in quantizers(model)] == pytest.approx([lam] * 6)
        assert controller.values()["sharpness"] == pytest.approx(2 + 6 * step / 20)


@pytest.mark.parametrize(
    ("method", "scheme", "options", "name"),
    [
        ("pege", "w4a16-channel", {"theta": "element", "initial": 0.5}, "theta"),
        ("freeze", "w4a16-channel", {}, "trend"),
        ("inq", "w5a16", {"share": 1.0}, "held"),
        ("elq", "w1.58a16", {"share": 1.0}, "held"),
    ],
)
def test_state_per_element_waits_for_the_start(method, scheme, options, name):
    controller, model = controlled(method, scheme, **options)
    state = [getattr(layer.weight_quant, name).clone() for _, layer in quant_layers(model)]
    if method == "freeze":
        assert all(bool((s == UNSEEN).all()) for s in state)
    run(controller, model, range(3))
    now = [getattr(layer.weight_quant, name) for _, layer in quant_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(state, now, strict=True))
    run(controller, model, range(3, 5))
    assert not any(torch.equal(a, b) for a, b in zip(state, now, strict=True))


def test_clipped_latent_weights_wait_for_the_start():
    """BinaryNet keeps its latent weights in [-1, 1]; float weights may be larger."""
    controller, model = controlled("binary", "w1a16", alpha="none")
    with torch.no_grad():
        model[0].weight.fill_(2.0)
    run(controller, model, range(3), SGD(model.parameters(), lr=0.0))
    assert bool((model[0].weight == 2.0).all())
    run(controller, model, [3], SGD(model.parameters(), lr=0.0))
    assert bool((model[0].weight == 1.0).all())


def test_curvature_is_measured_of_the_quantized_model():
    controller, _ = controlled("ewgs", delta="hessian", period=0.1, delay=5)
    assert [step for step in range(10) if controller.wants_curvature(step)] == [6, 8]


def test_learned_parameters_stay_where_they_are():
    controller, model = controlled("pege", "w4a8-channel-static", calibration=0, initial=0.5)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    controller.split_groups([optimizer], [])
    before = {n: p.clone() for n, p in model.named_parameters() if "_quant" in n and "input_quant.scale" not in n}
    run(controller, model, range(3), optimizer)
    for name, p in model.named_parameters():
        assert name not in before or torch.equal(p, before[name]), name
    run(controller, model, range(3, 5), optimizer)
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


# --- resuming, compiling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
@pytest.mark.parametrize(("method", "options"), [("lsq", {}), ("pege", {"theta": "element"}), ("freeze", {})])
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one(method, options, stop):
    settings = {"delay": 0.15, "calibration": 2, **options}
    controller, whole = controlled(method, **settings)
    run(controller, whole, range(8))
    controller, first = controlled(method, **settings)
    run(controller, first, range(stop))
    saved = copy.deepcopy((first.state_dict(), controller.state_dict()))
    controller, second = controlled(method, model=nn.Sequential(*net()), **settings)
    second.load_state_dict(saved[0])
    controller.load_state_dict(saved[1])
    run(controller, second, range(stop, 8))
    for (name, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# torch's tracer itself does what this is about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_start_compiles_nothing_anew():
    torch._dynamo.reset()
    controller, model = controlled("pege", "w4a8-channel")
    other, eager = controlled("pege", "w4a8-channel")
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for step in range(6):
        for control, module in ((controller, compiled), (other, eager)):
            control.on_step(step)
            module.zero_grad()
            module(batch(step)).square().mean().backward()
            control.after_optimizer_step()
        assert torch.allclose(model[0].weight.grad, eager[0].weight.grad, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == 1
