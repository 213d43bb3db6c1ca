"""Stochastic rounding and noise on weights: unbiased, a function of the step, gone in evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import tensor

from lightning_quant import QuantConfig
from lightning_quant.attach import attach
from lightning_quant.estimators import FakeQuantize
from lightning_quant.estimators.noise import Noise, Subset
from lightning_quant.estimators.pege_replace import PegeReplace
from lightning_quant.estimators.ste import Ste
from lightning_quant.estimators.stochastic import Stochastic
from lightning_quant.grid import Grid
from lightning_quant.noise import seed, uniform
from tests import oracle
from tests import test_estimators as contract
from tests.loop import Run, check_folded, check_run, convolutional, mlp
from tests.test_estimators import check, quantizer_of


def step_of(value):
    return tensor(value, dtype=torch.int64)


def over_steps(q, x, steps):
    """Outputs at many optimizer steps, stacked."""
    found = []
    for step in range(steps):
        q.step.fill_(step)
        found.append(q(x).detach())
    return torch.stack(found)


@pytest.mark.parametrize("step", [0, 5, 123_456, 2**31, 2**33 + 1])
@pytest.mark.parametrize("salt", [0, 7, 0xDEADBEEF, ~5])
def test_seed_stands_for_step_and_salt(step, salt):
    joint = seed(step_of(step), salt)
    assert joint.shape == ()
    assert uniform(torch.Size((3, 5)), joint).tolist() == oracle.uniform((3, 5), step, salt).tolist()


# --- stochastic rounding --------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased_and_keeps_to_the_neighbouring_levels():
    q, _ = quantizer_of(Stochastic(), "tensor", learn=False, shape=(1, 6))
    q.scale.fill_(0.5)
    x = tensor([[-3.9, -0.6, 0.05, 0.5, 1.3, 3.4]])
    found = over_steps(q, x, 4000)
    below, above = (x / 0.5).floor() * 0.5, (x / 0.5).ceil() * 0.5
    assert ((found == below) | (found == above)).all()
    # The standard error of a mean of 4000 is at most 0.5 * 0.5 / 63 = 0.004; levels themselves never move.
    assert (found.mean(dim=0) - x).abs().max() < 0.016
    assert (found[:, 0, 3] == 0.5).all()
    spread = found.std(dim=0)[0]
    share = (x - below)[0] / 0.5
    np.testing.assert_allclose(spread, 0.5 * (share * (1 - share)).sqrt(), atol=0.01)


def test_nearest_rounding_would_be_biased():
    """The test above can tell: the straight-through estimator's mean is off by up to half a step."""
    q, _ = quantizer_of(Ste(), "tensor", learn=False, shape=(1, 6))
    q.scale.fill_(0.5)
    x = tensor([[-3.9, -0.6, 0.05, 0.5, 1.3, 3.4]])
    assert (q(x) - x).abs().max() > 0.09


def test_levels_far_from_zero_stay_put():
    """u + n in float32 would round up where n is near 1: the fraction is rounded apart from its level."""
    u = torch.full((2_000_000,), 127.0) - 20.0
    code = Stochastic().assign(u, Grid(8), (step_of(3),), True)
    assert (code == 107).all()


def test_one_bit_is_a_coin():
    q, _ = quantizer_of(Stochastic(), "tensor", bits=1, learn=False, shape=(1, 4))
    q.scale.fill_(2.0)
    found = over_steps(q, tensor([[-1.5, -0.5, 0.6, 1.0]]), 3000)
    assert set(found.unique().tolist()) == {-1.0, 1.0}
    np.testing.assert_allclose((found == 1).float().mean(dim=0)[0], [0.0, 0.25, 0.8, 1.0], atol=0.03)


def test_noise_repeats_in_a_step_and_differs_between_steps_layers_and_elements():
    q, x = quantizer_of(Stochastic(), "channel")
    first = q(x)
    assert torch.equal(q(x), first)
    q.step.fill_(6)
    assert not torch.equal(q(x), first)
    q.step.fill_(5)
    q.salt = 12
    assert not torch.equal(q(x), first)
    same = q(torch.full_like(x, 0.4 * q.scale.max().item()))
    assert len(same.unique()) > 1


def test_the_backward_draws_the_forwards_numbers():
    """dL/ds = sum g (code - u) with the codes of this very forward."""
    q, x = quantizer_of(Stochastic(), "tensor", torch.float64, learn=True)
    g = torch.randn_like(x)
    y = q(x)
    y.backward(g)
    u = x.detach() / q.scale.detach()
    inside = (u >= -8) & (u <= 7)
    terms = g * (y.detach() / q.scale.detach() - u * inside)
    assert q.scale.grad.item() == pytest.approx(terms.sum().item() * q.range.factor(q, x), rel=1e-9)


def test_nothing_of_the_inputs_size_is_kept_for_the_noise():
    q, x = quantizer_of(Stochastic(), "tensor")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q(x)
    assert sum(t.numel() == x.numel() for t in kept) == 1  # the input itself


def test_stochastic_rounding_refuses_codebooks():
    with pytest.raises(ValueError, match="method stochastic: expected a uniform grid"):
        attach(mlp(), QuantConfig.parse("stochastic", "nf4-g4"))


# --- noise on weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
def test_uniform_noise_is_the_stated_formula(kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check("noise", *quantizer_of(Noise(kind="uniform"), kind, dtype))
    check("noise", *quantizer_of(Noise(kind="uniform"), kind, torch.float64, learn=True))
    check("noise", *quantizer_of(Noise(kind="uniform"), kind, torch.float64, symmetric=False, bits=3))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_uniform_noise_compiles_and_ignores_autocast():
    rule = Noise(kind="uniform")
    contract.test_compile_equals_eager_and_schedules_do_not_recompile(rule, "group")
    contract.test_autocast_changes_nothing_for_float_tensors(rule)
    contract.test_evaluation_is_hard_and_training_too_unless_the_method_blends(rule, "channel")


def test_uniform_noise_has_the_errors_spread_and_stays_in_the_range():
    q, _ = quantizer_of(Noise(kind="uniform"), "tensor", learn=False, shape=(1, 3))
    q.scale.fill_(0.5)
    x = tensor([[-0.7, 1.1, 3.4]])
    found = over_steps(q, x, 3000)
    assert (found - x).abs().max() <= 0.25
    assert found.max() == 3.5  # the top level, where the noise would lead beyond
    assert (found[..., :2].mean(dim=0) - x[:, :2]).abs().max() < 0.012
    np.testing.assert_allclose(found[..., :2].std(dim=0), 0.5 / np.sqrt(12), rtol=0.03)
    q.eval()
    assert q(x).tolist() == [[-0.5, 1.0, 3.5]]


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_a_share_of_the_blocks_is_quantized_whole(rate):
    q, _ = quantizer_of(Noise(rate=rate, block=5), "channel", learn=False, shape=(64, 128))
    q.scale.fill_(0.5)
    hard = torch.randint(-8, 8, (64, 128)) * 0.5
    x = hard + 0.125  # no value lies on its level, so that what is quantized can be told
    y = q(x)
    drawn = y == hard
    assert torch.equal(y[~drawn], x[~drawn])
    blocks = [drawn[:, i : i + 5] for i in range(0, 128, 5)]  # the last one of a row has 3 elements
    for block in blocks:
        assert torch.equal(block.all(dim=1), block.any(dim=1))
    found = torch.stack([block[:, 0] for block in blocks], dim=1).float()
    assert found.mean() == pytest.approx(rate, abs=0.04)
    if rate == 0.25:
        assert len(found.unique(dim=0)) > 60  # rows draw for themselves
        assert len(found.unique(dim=1).T) == len(blocks)


def test_blocks_of_one_are_the_replacement_of_pege_replace():
    results = []
    for rule in (Noise(rate=0.5), PegeReplace(share=0.5)):
        torch.manual_seed(2)
        q, x = quantizer_of(rule, "channel", torch.float64)
        y = q(x)
        results.append((y.detach(), torch.autograd.grad(y.sum(), x)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_gradient_passes_float_and_quantized_elements_alike():
    x = tensor([[0.3, 0.3, 0.3, 9.0]], dtype=torch.float64, requires_grad=True)
    inputs = (step_of(0), tensor(0.5))
    one = tensor([1.0], dtype=torch.float64)
    rule = Subset(Noise().role(True).rate, 1)
    y = FakeQuantize.apply(x, one, 0.0, None, Grid(4), True, 1.0, True, True, rule, *inputs)
    y.sum().backward()
    assert {0.3, 0.0} >= set(y[0, :3].tolist())
    assert x.grad.tolist() == [[1, 1, 1, 0]]


def test_rate_follows_its_schedule_and_activations_are_hard():
    ramp = {"curve": "linear", "start": 0.0, "end": 1.0}
    whole = Run("noise", "w4a8-channel", rate=ramp, total=10).steps(0, 5)
    assert whole.controller.values(5)["rate"] == 0.5
    whole.controller.on_step(10)
    assert whole.model[0].weight_quant.rate == 1.0
    x = torch.randn(4, 8)
    inputs = whole.model[0].input_quant
    assert torch.equal(inputs.train()(x), inputs.eval()(x))


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Noise(kind="gauss"), r"noise.kind: expected one of subset, uniform, got 'gauss'"),
        (lambda: Noise(rate=1.5), r"noise.rate: expected values in \[0, 1\], got 1.5"),
        (lambda: Noise(rate={"curve": "linear", "start": 0, "end": 2}), "noise.rate: expected values in"),
        (lambda: Noise(block=0), "noise.block: expected 1 or more elements, got 0"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        ("stochastic", "w4a16-g8", {}),
        ("stochastic", "w4a8-channel-static", {"learn_scale": True}),
        ("noise", "w4a16-g8", {"block": 3}),
        ("noise", "w4a16-channel-asym", {"kind": "uniform", "learn_scale": True}),
        ("noise", "nf4-g4", {}),
    ],
)
def test_short_run(method, scheme, options, tmp_path):
    whole = check_run(lambda: Run(method, scheme, lr=0.02, **options), drop=0.8)
    if "a8" not in scheme:
        check_folded(whole, tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"kind": "uniform"}])
def test_convolutions_train_too(options):
    check_run(lambda: Run("noise", "w4a8", convolutional(), lr=0.02, **options), drop=0.9)
    check_run(lambda: Run("stochastic", "w4a8", convolutional(), lr=0.02), drop=0.9)
