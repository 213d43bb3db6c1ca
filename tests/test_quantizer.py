"""FakeQuantizer: which scale is in force when, what is stored, what is measured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, tensor

from lightning_quant.estimators import build_estimator
from lightning_quant.granularity import Granularity
from lightning_quant.grid import reader_scale, symmetric_scale
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.scheme import TensorSpec


def weight_quantizer(
    kind="channel", *, bits=4, symmetric=True, dynamic=False, learn=False, shape=(4, 8), axis=0, **more
):
    size = 4 if kind == "group" else None
    observer = "minmax" if dynamic else "mse"
    spec = TensorSpec(bits, symmetric, kind, size, dynamic, observer, learn, grid="int", range="scale")
    rule = build_estimator(more.pop("method", "ste"))
    return FakeQuantizer(spec, Granularity(kind, axis, size or 0), rule, shape=shape, **more)


def input_quantizer(*, dynamic=False, symmetric=True, bits=8, learn=False, method="ste", **more):
    kind = "token" if dynamic else "tensor"
    spec = TensorSpec(bits, symmetric, kind, None, dynamic, "ema", learn, grid="int", range="scale")
    return FakeQuantizer(spec, Granularity(kind, None), build_estimator(method), channels=8, **more)


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "persistent"),
    [
        (weight_quantizer(), {"scale"}),
        (weight_quantizer(symmetric=False), {"scale", "zero"}),
        (weight_quantizer(dynamic=True), set()),
        (weight_quantizer(method="pege"), {"scale", "theta"}),
        (weight_quantizer(method="dsq"), {"scale", "alpha"}),
        (weight_quantizer(method="pege_replace"), {"scale"}),
        (input_quantizer(), {"scale", "running"}),
        (input_quantizer(symmetric=False), {"scale", "zero", "running"}),
        (input_quantizer(dynamic=True), set()),
    ],
)
def test_persistent_state(q, persistent):
    """Scheduled scalars and counters are never saved; nothing saved is 0-dim, which sharding refuses."""
    assert set(q.state_dict()) == persistent
    assert all(t.ndim >= 1 for t in q.state_dict().values())
    assert all(p.ndim >= 1 for p in q.parameters())
    for name in q.estimator.schedules():
        assert q._buffers[name].shape == ()
        assert name in q._non_persistent_buffers_set


def test_learned_scale_is_a_parameter():
    learned = dict(weight_quantizer(learn=True).named_parameters())
    assert set(learned) == {"scale"}
    assert not dict(weight_quantizer().named_parameters())
    assert [f for _, f in weight_quantizer(learn=True, method="pege").learned()] == [None, 10.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_state(dtype):
    q = weight_quantizer(symmetric=False, method="pege", dtype=dtype)
    assert {t.dtype for t in q.state_dict().values()} == {dtype}
    assert q.dtype == dtype


def test_state_dict_round_trip_makes_a_quantizer_ready():
    weight = torch.randn(4, 8)
    q, fresh = weight_quantizer(), weight_quantizer()
    q.fit_range(weight)
    assert not fresh.ready
    fresh.load_state_dict(q.state_dict())
    assert fresh.ready
    assert torch.equal(fresh(weight), q(weight))
    fresh.load_state_dict({"scale": torch.zeros(4, 1)})
    assert not fresh.ready


def test_deepcopy_is_independent():
    q = weight_quantizer()
    q.fit_range(torch.randn(4, 8))
    twin = copy.deepcopy(q)
    twin.scale.fill_(9.0)
    assert (q.scale != 9).all()


def test_half_precision_state_follows_a_cast():
    q = weight_quantizer(method="pege").to(torch.bfloat16)
    q.fit_range(torch.randn(4, 8, dtype=torch.bfloat16))
    assert q(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- ranges ---------------------------------------------------------------------------------------------------------


def test_set_range_hand_values():
    q = weight_quantizer(bits=4, shape=(2, 3))
    q.set_range(tensor([-7.0, -1.0]), tensor([3.5, 14.0]))
    assert q.scale.tolist() == [[1.0], [2.0]]
    assert q(tensor([[2.4, 9.0, -20.0], [2.9, 3.1, 0.9]])).tolist() == [[2, 7, -8], [2, 4, 0]]


@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
@pytest.mark.parametrize("axis", [0, 1])
def test_dynamic_weight_scale_follows_the_weight(kind, axis):
    q = weight_quantizer(kind, bits=8, dynamic=True, axis=axis)
    for _ in range(2):
        weight = torch.randn(4, 8)
        y = q(weight)
        rows = q.granularity.flat(weight)
        levels = symmetric_scale(rows.abs().amax(dim=1, keepdim=True), 8)
        assert torch.equal(q.granularity.flat(y), (rows / levels).round() * levels)
        largest = rows.abs().argmax(dim=1)
        picked = q.granularity.flat(y)[torch.arange(len(rows)), largest]
        torch.testing.assert_close(picked, rows[torch.arange(len(rows)), largest])  # the largest is a level


@pytest.mark.parametrize("target", ["vllm", "transformers"])
def test_dynamic_tokens_follow_the_runtime(target):
    q = input_quantizer(dynamic=True, target=target)
    x = torch.randn(2, 3, 8)
    rule = reader_scale if target == "transformers" else symmetric_scale
    scale = rule(x.abs().amax(dim=-1, keepdim=True), 8)
    assert torch.equal(q(x), (x / scale).round().clamp(-128, 127) * scale)
    flat = torch.randn(6, 8)
    whole = target == "transformers"  # that reader takes one scale for a two-dimensional input
    absmax = flat.abs().amax().reshape(1, 1) if whole else flat.abs().amax(dim=-1, keepdim=True)
    assert torch.equal(q(flat), (flat / rule(absmax, 8)).round().clamp(-128, 127) * rule(absmax, 8))


def test_zeros_stay_zeros():
    for q in (input_quantizer(dynamic=True), weight_quantizer("group", dynamic=True), input_quantizer()):
        assert not q(torch.zeros(4, 8)).any()


def test_static_range_is_each_samples_own_until_it_is_set():
    q = input_quantizer()
    x = torch.randn(5, 8)
    scale = symmetric_scale(x.abs().amax(dim=1, keepdim=True), 8)
    assert torch.equal(q(x), (x / scale).round() * scale)
    assert not q.ready
    q.observing = True
    q(x)
    q.commit()
    assert q.ready
    assert q.scale.item() == pytest.approx(scale.max().item())
    q.observing = False
    assert q(10 * x).abs().max() <= scale.max() * 128 * 1.001  # later data are clipped


def test_static_learned_scale_gets_a_gradient_before_the_range_is_set():
    """DistributedDataParallel stops a run in which a parameter had no part in the first backward."""
    q = input_quantizer(learn=True, method="lsq")
    q(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert q.scale.grad is not None
    assert q.scale.grad.item() == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_observing_merges_micro_batches_by_extremes_and_steps_by_averaging(symmetric):
    q = input_quantizer(symmetric=symmetric)
    q.observing = True
    for batch in ([-1.0, 2.0], [-4.0, 1.0]):
        q(tensor([batch]))
    q.commit()
    assert q.running.tolist() == [-4, 2]
    q(tensor([[-14.0, 12.0]]))
    q(tensor([[-14.0, 12.0]]))  # a repeated forward (activation checkpointing) changes nothing
    q.commit()
    assert q.running.tolist() == pytest.approx([-5.0, 3.0])
    expected = 5 / 127 if symmetric else 8 / 255
    assert q.scale.item() == pytest.approx(expected)
    q.commit()
    assert q.running.tolist() == pytest.approx([-5.0, 3.0])


def test_an_empty_batch_is_not_observed():
    q = input_quantizer()
    q.observing = True
    assert q(torch.empty(0, 8)).shape == (0, 8)
    q.commit()
    assert not q.ready
    q(torch.ones(2, 8))
    q(torch.empty(0, 8))
    q.commit()
    assert q.running.tolist() == [1, 1]


# --- what is stored is what is computed -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
@pytest.mark.parametrize(("dynamic", "symmetric"), [(True, True), (False, True), (False, False), (True, False)])
def test_stored_codes_and_scales_rebuild_the_forward(kind, bits, axis, dtype, dynamic, symmetric):
    q = weight_quantizer(kind, bits=bits, dynamic=dynamic, symmetric=symmetric, axis=axis, dtype=dtype).eval()
    weight = torch.randn(4, 8).to(dtype)
    q.fit_range(weight)
    code, scale, zero, offset = q.stored(weight)
    assert offset is None
    assert code.dtype == torch.int8
    assert code.shape == weight.shape
    assert code.min() >= q.low
    assert code.max() <= q.high
    assert scale.shape == q.scale_shape
    assert isinstance(zero, float) == symmetric
    point = q.granularity.lift(zero).float() if isinstance(zero, torch.Tensor) else -0.5 if bits == 1 else 0.0
    rebuilt = (q.granularity.view(code).float() - point) * q.granularity.lift(scale).float()
    rebuilt = q.granularity.unview(rebuilt, weight.shape).to(dtype)
    assert torch.equal(rebuilt, q(weight))
    assert torch.equal(rebuilt, q.on_grid(weight))


def test_measured_error_and_progressive_loss():
    q = weight_quantizer(method="pege")
    weight = torch.randn(4, 8)
    q.fit_range(weight)
    q.lam.fill_(0.25)
    q.measuring = True
    y = q(weight)
    assert set(q.measured) == {"error", "clip", "scale", "progressive_loss"}
    error = (y - weight).square().sum()
    assert q.measured["error"].item() == pytest.approx((error / weight.square().sum()).item(), rel=1e-5)
    inside = (y - weight.clamp(-8 * q.scale, 7 * q.scale)).square().sum()  # b = 0: F is the clipped input
    assert q.measured["progressive_loss"].item() == pytest.approx(0.25 * inside.item(), rel=1e-4)


def test_noise_repeats_within_a_step_and_changes_with_it():
    q = weight_quantizer(method="pege_replace", salt=4)
    weight = torch.randn(4, 8)
    q.fit_range(weight)
    q.share.fill_(0.5)
    first = q(weight)
    assert torch.equal(q(weight), first)
    q.step.fill_(1)
    assert not torch.equal(q(weight), first)
    assert not torch.equal(q.eval()(weight), first)


def test_unknown_observer_names_the_tensor():
    spec = TensorSpec(4, True, "channel", None, False, "msee", False, grid="int", range="scale")
    with pytest.raises(ValueError, match=r"fc.weight: TensorSpec.observer: .*got 'msee'. Did you mean observer 'mse'"):
        FakeQuantizer(spec, Granularity("channel"), build_estimator("ste"), shape=(2, 2), where="fc.weight")


def test_repr_says_it_all():
    q = weight_quantizer("group", symmetric=False, learn=True, method="lsq")
    assert q.extra_repr() == "4 bits, asymmetric, group(4), learned range, lsq"
    assert isinstance(q, nn.Module)
