"""What is reported about quantizers: values a reader checks by head, names, cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_quant import QuantConfig, QuantController
from lightning_quant.attach import quantizers
from lightning_quant.estimators import build_estimator
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.metrics import clipped, reach
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.resolve import resolve_activation
from lightning_quant.scheme import TensorSpec


def controlled(method="lsq", scheme="w4a16-tensor", model=None, total=100, **options):
    """A controller and its model: a single layer of 16 weights unless one is given, on the grid -8..7 of step 1."""
    controller = QuantController(QuantConfig.parse(method, scheme, **options))
    single = model is None
    model = nn.Sequential(nn.Linear(4, 4, bias=False)) if single else model
    if single:
        model[0].weight.data.copy_(torch.linspace(-3, 3, 16).round().reshape(4, 4))
    controller.prepare(model)
    if single:
        model[0].weight_quant.scale.data.fill_(1.0)
    controller.begin(total)
    return controller, model


def update(controller, step=0, change=None, measure=True):
    """One optimizer step as the front ends drive one; ``change`` is what the optimizer does."""
    controller.on_step(step, measure=measure)
    controller.model(torch.ones(2, 4))
    controller.before_optimizer_step()
    if change is not None:
        with torch.no_grad():
            change(controller.model[0])
    controller.after_optimizer_step()
    return controller.metrics()


# --- clip -------------------------------------------------------------------------------------------------------------


def test_three_of_sixteen_weights_clip():
    controller, model = controlled()
    model[0].weight.data.flatten()[:8] = torch.tensor([-9.0, 7.75, 100.0, -8.25, 7.25, -8.0, 7.0, 0.4])
    assert update(controller)["clip"] == 3 / 16


@pytest.mark.parametrize(
    ("grid", "outside", "held"),
    [
        (Grid(4), [-8.75, 7.75], [-8.25, 7.25]),
        (Grid(4, narrow=True), [-7.75, 7.75], [-7.25, 7.25]),
        (Grid(1.58), [-1.75, 1.75], [-1.25, 1.25]),
        (Grid(4, kind="e2m1"), [-7.25, 7.25], [-6.75, 6.75]),
        (Grid(2, kind="apot"), [-1.75, 1.75], [-1.25, 1.25]),
    ],
)
def test_reach_is_half_a_step_beyond_the_outermost_levels(grid, outside, held):
    assert clipped(torch.tensor(outside + held), torch.ones(1), 0.0, grid) == 0.5
    low, high = reach(grid)
    outermost = (grid.low, grid.high) if grid.levels is None else (grid.levels[0], grid.levels[-1])
    assert low < outermost[0]
    assert high > outermost[1]


def test_one_bit_clips_beyond_its_two_levels_by_half_their_distance():
    """Levels +-1 of scale 2: what lies beyond +-2 is further from them than anything between them is."""
    x = torch.tensor([-2.5, -1.5, 0.1, 1.9, 2.1])
    assert clipped(x, torch.tensor([2.0]), -0.5, Grid(1)) == pytest.approx(2 / 5)


def input_quantizer(**fields):
    spec = resolve_activation(TensorSpec(4, **fields), False, build_estimator("ste"), "x")
    return FakeQuantizer(spec, Granularity(spec.granularity, None), build_estimator("ste"), channels=4)


def measured(q, x):
    q.measuring = True
    q(x)
    return {name: value.item() for name, value in q.measured.items()}


def test_clipped_inputs_count_from_the_zero_point():
    q = input_quantizer(symmetric=False, dynamic=False, granularity="tensor")
    q.set_range(torch.tensor([0.0]), torch.tensor([15.0]))  # scale 1, zero point -8
    found = measured(q, torch.tensor([[-0.25, -0.75, 0.0, 15.0], [15.25, 16.0, 7.0, 1.0]]))
    assert found["clip"] == 2 / 8
    assert found["scale"] == 1.0
    assert found["error"] == pytest.approx((0.25**2 + 0.75**2 + 0.25**2 + 1) / (0.625 + 225 + 15.25**2 + 256 + 50))


def test_dynamic_ranges_that_cover_their_tensor_clip_nothing():
    found = measured(input_quantizer(symmetric=True, dynamic=True), torch.tensor([[7.0, 1, 2, -7], [0.7, 0, 0, 0]]))
    assert found["clip"] == 0
    assert found["scale"] == pytest.approx((1 + 0.1) / 2)


def test_an_input_without_elements_measures_zeros():
    found = measured(input_quantizer(symmetric=True, dynamic=False, granularity="tensor"), torch.empty(0, 4))
    assert found["error"] == found["clip"] == 0


def test_error_keeps_its_digits_on_large_tensors():
    """A float32 sum of ten million squares in one accumulator is off in its third digit."""
    q = input_quantizer(symmetric=True, dynamic=False, granularity="tensor")
    q.set_range(torch.tensor([-4.0]), torch.tensor([4.0]))
    x = torch.randn(2500, 4000)
    wanted = ((q(x) - x).double().square().sum() / x.double().square().sum()).item()
    assert measured(q, x)["error"] == pytest.approx(wanted, rel=1e-5)


# --- flips ------------------------------------------------------------------------------------------------------------


def test_one_code_of_sixteen_flips():
    controller, _ = controlled()

    def change(layer):
        layer.weight.view(-1)[3] += 0.6  # to the next level
        layer.weight.view(-1)[5] += 0.4  # back to its own

    assert update(controller, 0, change)["flips"] == 1 / 16
    assert update(controller, 1)["flips"] == 0
    assert controller._codes == {}


def test_flips_are_of_one_update_and_of_measured_ones_only():
    controller, _ = controlled()
    update(controller, 0, lambda layer: layer.weight.add_(1.0), measure=False)
    assert "flips" not in controller.metrics()
    assert update(controller, 1)["flips"] == 0


def test_moving_scales_flip_codes_too():
    controller, model = controlled()
    model[0].weight.data.fill_(3.0)
    assert update(controller, 0, lambda layer: layer.weight_quant.scale.fill_(1.3))["flips"] == 1


@pytest.mark.parametrize(("method", "scheme"), [("stochastic", "w2a16-tensor"), ("noise", "w2a16-tensor")])
def test_codes_drawn_in_training_are_no_flips(method, scheme):
    controller, _ = controlled(method, scheme)
    assert update(controller)["flips"] == 0


@pytest.mark.parametrize("scheme", ["nf4-g16", "w3a16-g4-asym", "w8a8", "w2a16-channel"])
def test_flips_count_codes_on_every_kind_of_grid(scheme):
    torch.manual_seed(0)
    controller, model = controlled("ste", scheme, nn.Sequential(nn.Linear(64, 64)), coverage="off")
    q, weight = model[0].weight_quant, model[0].weight
    controller.on_step(0, measure=True)
    before = q.stored(weight)[0]
    controller.before_optimizer_step()
    weight.data += 0.02 * torch.randn_like(weight)
    controller.after_optimizer_step()
    wanted = (q.stored(weight)[0] != before).float().mean().item()
    assert 0 < wanted < 1
    assert controller.metrics()["flips"] == pytest.approx(wanted, rel=1e-6)


# --- drift, state -----------------------------------------------------------------------------------------------------


def test_drift_is_the_mean_change_of_learned_scales_since_the_run_began():
    controller, model = controlled("lsq", "w4a16-channel")
    assert controller.metrics()["scale_drift"] == 0
    model[0].weight_quant.scale.data *= torch.tensor([[1.5], [0.5], [1.0], [1.0]])
    assert controller.metrics()["scale_drift"] == pytest.approx(0.25)
    controller.begin(100)
    assert controller.metrics()["scale_drift"] == 0


def test_drift_of_inputs_starts_when_their_range_has_been_observed():
    controller, model = controlled("lsq", "w4a8-channel-static", calibration=2)
    for step in range(2):
        assert "input_scale_drift" not in update(controller, step)
    assert update(controller, 2)["input_scale_drift"] == 0
    model[0].input_quant.scale.data *= 3
    assert update(controller, 3)["input_scale_drift"] == pytest.approx(2)


@pytest.mark.parametrize(("method", "scheme"), [("ste", "w4a8-channel-static"), ("lsq", "w8a8")])
def test_scales_that_nobody_learns_have_no_drift(method, scheme):
    """Those of 8-bit weights follow the weights, those of dynamic inputs the data."""
    controller, _ = controlled(method, scheme, nn.Sequential(nn.Linear(4, 4)), calibration=0)
    assert not {"scale_drift", "input_scale_drift"} & set(update(controller))


def test_theta_s_mean_and_largest_value():
    for theta, kept in (("group", [0.0, 0.5, 0.25, 1.0]), ("element", [0.2, 0.6] * 8)):
        controller, model = controlled("pege", "w4a16-channel", theta=theta)
        b = model[0].weight_quant.theta
        values = torch.tensor(kept) * (255 if theta == "element" else 1)
        b.data.copy_(values.reshape(b.shape).to(b.dtype))
        metrics = controller.metrics()
        assert metrics["theta"] == pytest.approx(sum(kept) / len(kept))
        assert metrics["theta_max"] == pytest.approx(max(kept))


def test_only_a_learned_alpha_is_state():
    scheduled = {"curve": "hardness", "start": 0.2, "end": 0.02}
    assert controlled("dsq")[0].metrics(layers=True)["0/weight_alpha"] == pytest.approx(0.2)
    metrics = controlled("dsq", alpha=scheduled)[0].metrics(layers=True)
    assert metrics["alpha"] == pytest.approx(0.2)
    assert "0/weight_alpha" not in metrics


# --- means and layers -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two quantized layers whose sum a quantizer of its own rounds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.join = nn.Identity()

    def forward(self, x):
        return self.join(x + self.body(x))


def joined(method="pege", scheme="w4a8-g16", **options):
    controller = QuantController(QuantConfig.parse(method, scheme, **options))
    torch.manual_seed(0)
    model = Net()
    controller.prepare(model)
    spec = TensorSpec(8, True, "tensor", None, False, "ema", False, grid="int", range="scale")
    model.join = FakeQuantizer(spec, Granularity("tensor", None), build_estimator("ste"), channels=16)
    controller.begin(10)
    return controller, model


def test_names_of_layers_and_of_quantizers_of_their_own():
    controller, model = joined(lam=0.25)
    controller.on_step(0, measure=True)
    model(torch.randn(4, 16))
    metrics = controller.metrics(layers=True)
    measured = {"error", "clip", "scale"}
    own = {*measured, "theta", "theta_max", "progressive_loss"}
    wanted = {f"body.{i}/weight_{name}" for i in (0, 1) for name in {*own, "scale_drift"}}
    wanted |= {f"body.{i}/input_{name}" for i in (0, 1) for name in own}
    wanted |= {f"join/{name}" for name in measured}
    assert {name for name in metrics if "/" in name} == wanted
    means = {k: v for k, v in metrics.items() if "/" not in k}
    assert means == controller.metrics()
    assert not {"scale", "input_scale"} & set(means)


def test_the_whole_model_s_figures_are_those_of_its_layers_together():
    controller, model = joined(lam=0.25)
    controller.on_step(0, loss_scale=8.0, measure=True)
    model.body[0].weight_quant.theta.data.fill_(0.5)
    model.body[1].weight_quant.theta.data.fill_(1.0)
    model(torch.randn(4, 16))
    m = controller.metrics(layers=True)
    assert m["error"] == pytest.approx((m["body.0/weight_error"] + m["body.1/weight_error"]) / 2)
    assert m["input_error"] == pytest.approx((m["body.0/input_error"] + m["body.1/input_error"] + m["join/error"]) / 3)
    assert m["theta"] == pytest.approx((0.5 + 1.0 + 0 + 0) / 4)
    assert m["theta_max"] == 1
    losses = [v for k, v in m.items() if k.endswith("progressive_loss") and "/" in k]
    assert len(losses) == 4
    assert m["progressive_loss"] == pytest.approx(sum(losses))


# --- when, and at what cost -------------------------------------------------------------------------------------------


def test_measured_is_the_last_forward_and_recomputing_it_changes_nothing():
    controller, model = joined()
    first, second = torch.randn(4, 16), 3 * torch.randn(4, 16)
    controller.on_step(20, measure=True)
    model(second).sum().backward()
    wanted = controller.metrics(layers=True)
    for x in (first, second):
        controller.on_step(20, measure=True)
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert controller.metrics(layers=True) == wanted


class Transfers(TorchDispatchMode):
    """Counts reads of single numbers, each of which would wait for the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [False, True])
def test_a_measured_step_waits_for_the_device_once(monkeypatch, layers):
    controller, model = joined(lam=0.25)
    lists, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t.shape) or real(t))
    for step, scale in ((20, 1.0), (21, torch.tensor(4.0))):
        controller.on_step(step, scale, measure=True)
        with Transfers() as transfers:
            model(torch.randn(4, 16))
            controller.before_optimizer_step()
            for q in controller._quantizers:
                q.called = True
            controller.after_optimizer_step()
            metrics = controller.metrics(layers)
        assert transfers.count == 0
        assert len(lists) == 1
        assert lists.pop().numel() >= 20
        assert {"flips", "clip", "progressive_loss"} <= set(metrics)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
def test_measuring_compiles_one_graph_more_however_often_it_is_done():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    plain, compiled = joined("pege", "w4a8-static-g16", calibration=0), joined("pege", "w4a8-static-g16", calibration=0)
    forward = torch.compile(compiled[1], backend=graphs, fullgraph=True)
    for _, model in (plain, compiled):
        for _, q in quantizers(model):
            if not q.is_weight:
                q.set_range(torch.tensor([-3.0]), torch.tensor([3.0]))
    for step in range(1, 10):
        x, measure = torch.randn(4, 16), step % 3 == 0
        for (controller, model), call in ((plain, plain[1]), (compiled, forward)):
            controller.on_step(step, measure=measure)
            model.zero_grad()
            call(x).sum().backward()
            controller.before_optimizer_step()
            controller.after_optimizer_step()
        if measure:
            expected, found = (c.metrics(layers=True) for c, _ in (plain, compiled))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert graphs.frame_count == 2
