"""STE's masks and the slopes of Bi-Real Net, ReActNet and IR-Net: hand values, balance, refusals, short runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn, tensor

from lightning_quant import QuantConfig
from lightning_quant.attach import attach
from lightning_quant.estimators import FakeQuantize, build_estimator
from lightning_quant.estimators.bireal import BiReal
from lightning_quant.estimators.ede import Ede
from lightning_quant.estimators.react import React
from lightning_quant.estimators.ste import Ste
from lightning_quant.granularity import Granularity
from lightning_quant.grid import Grid
from lightning_quant.quantizer import FakeQuantizer
from lightning_quant.scheme import TensorSpec
from lightning_quant.spec import LayerRule
from tests import test_estimators as contract
from tests.loop import Run, check_folded, check_run, convolutional
from tests.test_estimators import check, expected, quantizer_of, run


def slopes(rule, x, bits, scale, inputs=(), zero=0.0):
    """dy/dx at some points in float64."""
    return run(rule, x, [scale], bits, [1.0] * len(x), inputs, zero)[:2]


# --- the straight-through estimator's masks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "want"), [("clamp", [0, 1, 1, 1, 0, 0]), ("round", [0, 1, 1, 1, 1, 0]), ("none", [1, 1, 1, 1, 1, 1])]
)
def test_vector_ste_masks(mask, want):
    x = [-1.2, -0.35, -0.1, 0.12, 0.26, 0.9]
    y, gx = slopes(Ste(mask), x, 2, 0.25)
    assert y == [-0.5, -0.25, 0, 0, 0.25, 0.25]
    assert gx == want


def test_vector_binary_ste():
    """Levels +-1: the sign with sgn(0) = +1, and gradients on [-1, 1]."""
    y, gx = slopes(Ste(), [-1.5, -0.3, 0.0, 0.8], 1, 2.0, zero=-0.5)
    assert y == [-1, -1, 1, 1]
    assert gx == [0, 1, 1, 1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_round_first_mask_is_that_of_torch(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = torch.linspace(1.3 * low, 1.3 * high, 4001) * 0.1
    grads = []
    for quantize in (
        lambda v: torch.fake_quantize_per_tensor_affine(v, 0.1, 0, low, high),
        lambda v: FakeQuantize.apply(v, tensor([0.1]), 0.0, None, Grid(bits), True, 1.0, True, False, Ste("round")),
    ):
        leaf = x.clone().requires_grad_()
        quantize(leaf).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert 0 < grads[0].sum() < len(x)


def test_masks_on_a_codebook_end_half_of_the_outermost_gap_further():
    grid = Grid(4, kind="e2m1")  # ends in 4 and 6
    assert Ste("round").edges(grid) == (-7.0, 7.0)
    assert Ste().edges(grid) is None


@pytest.mark.parametrize("mask", ["round", "none"])
@pytest.mark.parametrize("kind", ["channel", "group", "token", "static"])
def test_other_masks_are_the_stated_formula(mask, kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check("ste", *quantizer_of(Ste(mask), kind, dtype, learn=kind == "group" or None))


def test_infinite_inputs_keep_gradients_finite_under_every_mask():
    for mask in ("round", "none"):
        _, gx = slopes(Ste(mask), [-math.inf, 0.0, math.inf], 4, 0.5)
        assert gx == [0, 1, 0]


# --- Bi-Real Net ----------------------------------------------------------------------------------------------------


def test_vector_bireal():
    y, gx = slopes(BiReal(), [-1.5, -0.5, 0.25, 0.5, 2.0], 1, 2.0, zero=-0.5)
    assert y == [-1, -1, 1, 1, 1]
    assert gx == [0, 1, 1.5, 1, 0]


@pytest.mark.parametrize("bits", [1, 4])
def test_bireal_slope_is_1_on_average_over_a_bin_and_0_on_levels(bits):
    x = (np.arange(1000) + 0.5) / 1000 - (0.5 if bits == 1 else 0.0)
    _, gx = slopes(BiReal(), [*x, 0.5 if bits == 1 else 1.0], bits, 1.0, zero=-0.5 if bits == 1 else 0.0)
    assert np.mean(gx[:-1]) == pytest.approx(1.0, rel=1e-12)
    assert gx[-1] == 0
    assert max(gx) == pytest.approx(2.0, abs=0.01)


def test_bireal_on_activations_only():
    rule = BiReal(weights="clipped")
    assert rule.role(False) is rule
    assert isinstance(rule.role(True), Ste)
    assert rule.role(True).learns_scale
    grads = []
    for chosen in (rule, Ste()):
        torch.manual_seed(1)
        q, x = quantizer_of(chosen, "channel", torch.float64, bits=1, learn=False)
        q(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


# --- ReActNet -------------------------------------------------------------------------------------------------------


def test_shift_is_subtracted_before_the_sign():
    q, _ = quantizer_of(React(), "static", torch.float64, bits=1, learn=False, shape=(4, 2))
    q.set_range(tensor([-1.0]), tensor([1.0]))
    q.shift.data.copy_(tensor([0.5, -0.5]))
    x = tensor([[0.25, 0.25], [0.75, -0.75], [2.0, -1.75]], dtype=torch.float64, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y.tolist() == [[-1, 1], [1, -1], [1, -1]]
    assert x.grad.tolist() == [[1.5, 0.5], [1.5, 1.5], [0, 0]]  # 2 - 2 |x - shift| on [-1, 1]
    assert q.shift.grad.tolist() == [-3.0, -2.0]


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (3, 4, 5)])
def test_shift_belongs_to_the_channels_of_an_image(size):
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    attach(model, QuantConfig.parse("react", "w1a1-channel-static"))
    q = model[0].input_quant.double()
    assert q.shift.shape == (3,)
    q.shift.data.copy_(tensor([0.0, 10.0, -10.0]))
    q.set_range(tensor([-1.0]), tensor([1.0]))
    y = q(torch.randn(size, dtype=torch.float64)).movedim(-3, 0)
    assert (y[1] == -1).all()
    assert (y[2] == 1).all()
    assert set(y[0].flatten().tolist()) == {-1.0, 1.0}


def test_weights_of_react_are_straight_through():
    for mask in ("clamp", "none"):
        grads = []
        for rule in (React(mask=mask), Ste(mask)):
            torch.manual_seed(1)
            q, x = quantizer_of(rule, "channel", torch.float64, bits=1, learn=False)
            q(x).sum().backward()
            grads.append(x.grad)
            assert "shift" not in q.state_dict()
        assert torch.equal(*grads)


def test_narrow_inputs_are_shifted_in_float32():
    """A shift that bfloat16 would lose beside the input still moves values across a threshold."""
    q, _ = quantizer_of(React(), "static", torch.bfloat16, bits=4, learn=False, shape=(4, 1))
    q.set_range(tensor([-8.0]), tensor([7.0]))
    x = tensor([[0.5]], dtype=torch.bfloat16)  # on the threshold between 0 and 1; the tie goes to 0
    q.scale.data.fill_(1.0)
    q.shift.data.fill_(-(2.0**-12))
    assert q(x).item() == 1.0
    assert q(x).dtype == torch.bfloat16


# --- IR-Net ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "t", "k"), [(0, 0.1, 10.0), (25, 0.316, 3.16), (50, 1.0, 1.0), (75, 3.16, 1.0), (100, 10.0, 1.0)]
)
def test_vector_ede_schedule(share, t, k):
    """t and k over the run, k read off the slope in the middle between the levels, k t, and off its neighbourhood."""
    at = Ede().schedules()["t"](share, 100)
    assert at == pytest.approx(t, rel=2e-3)
    x = [0.0, 0.3, -0.3, 0.9, 1.5]
    q_inputs = ([at],)
    _, gx = slopes(Ede(), x, 1, 2.0, q_inputs, zero=-0.5)
    exact = max(1 / at, 1)
    assert exact == pytest.approx(k, rel=2e-3)
    assert gx == pytest.approx([exact * at * (1 - math.tanh(at * v) ** 2) for v in x], rel=1e-12)


def test_ede_reaches_beyond_the_outermost_levels_and_continues_the_last_bin():
    """4 bits: values beyond the top level 7 have the slope of the bin around 6.5, decaying."""
    x = [6.75, 7.0, 7.5, 9.0, -8.0, -9.5]
    _, gx = slopes(Ede(), x, 4, 1.0, ([1.0],))
    v = [0.5, 1.0, 2.0, 5.0, 1.0, 4.0]
    assert gx == pytest.approx([1 - math.tanh(w) ** 2 for w in v], rel=1e-12)


def test_ede_tail_keeps_its_digits_in_float32():
    x = tensor([6.0], requires_grad=True)
    t = tensor([1.5])
    FakeQuantize.apply(x, tensor([2.0]), -0.5, None, Grid(1), True, 1.0, True, False, Ede(), t).backward(tensor([1.0]))
    assert x.grad.item() == pytest.approx(1.5 / math.cosh(9.0) ** 2, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["channel", "group", "tensor"])
def test_balanced_weights_are_the_stated_formula(kind, dtype):
    check("ede", *quantizer_of(Ede(t=1.5), kind, dtype, bits=2))
    check("ede", *quantizer_of(Ede(t=0.3), kind, dtype, bits=1, learn=False))


@pytest.mark.parametrize("axis", [0, 1])
def test_balance_is_per_output_channel(axis):
    w = torch.randn(4, 6, 3, dtype=torch.float64) * 3 + 1
    spec = TensorSpec(1, True, "channel", None, False, "mse", False, grid="int", range="scale")
    q = FakeQuantizer(spec, Granularity("channel", axis), Ede(), shape=tuple(w.shape), dtype=w.dtype)
    rows = Ede().transform(q, w).movedim(axis, 0).flatten(1)
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(len(rows), dtype=w.dtype))
    torch.testing.assert_close(rows.square().mean(dim=1), torch.ones(len(rows), dtype=w.dtype))
    q.fit_range(w)
    signs = torch.sign(w - w.mean(dim=[d for d in range(3) if d != axis], keepdim=True))
    assert torch.equal(torch.sign(q.eval()(w)), signs)
    scaled = q(7 * w + 2)  # standardising forgets both
    torch.testing.assert_close(scaled, q(w))


def test_balance_leaves_activations_alone_and_survives_constant_rows():
    q, x = quantizer_of(Ede(), "static")
    assert q.estimator.transform(q, x) is x
    q, _ = quantizer_of(Ede(t=1.0), "channel", bits=1)
    w = torch.full((4, 128), 0.25, requires_grad=True)
    q(w).sum().backward()
    assert w.grad.isfinite().all()


def test_ede_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"ede.t: expected values above 0, got 0.0. The authors go from"):
        Ede(t=0.0)
    with pytest.raises(ValueError, match="grid in"):
        attach(nn.Sequential(nn.Linear(8, 8)), QuantConfig.parse("ede", "nf4-g8"))
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"0: ede.balance: expected 2 or more weights per output channel, got 1"):
        attach(model, QuantConfig.parse("ede", "w1a1"))
    attach(model, QuantConfig.parse("ede", "w1a1", rules=(LayerRule("0", weight=None),)))


@pytest.mark.parametrize("method", ["bireal", "react", "ede"])
def test_one_bit_is_a_sign_in_convolutions_too(method):
    """Static activations of convolutions are asymmetric otherwise, which for one bit would be 0 and one level."""
    for scheme, symmetric in (("w1a1-channel-static", True), ("w1a2-channel-static", False)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        attach(model, QuantConfig.parse(method, scheme))
        assert model[0].input_quant.spec.symmetric == symmetric
        assert model[0].weight_quant.spec.symmetric


# --- settings beside the contract's, under its other checks ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("rule", [Ste("round"), Ste("none"), Ede(), BiReal("clipped")], ids=str)
def test_other_settings_compile_and_ignore_autocast(rule):
    contract.test_compile_equals_eager_and_schedules_do_not_recompile(rule, "group")
    contract.test_autocast_changes_nothing_for_float_tensors(rule)
    contract.test_evaluation_is_hard_and_training_too_unless_the_method_blends(rule, "channel")


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ste(mask="clip"), r"ste.mask: expected one of clamp, none, round, got 'clip'"),
        (lambda: BiReal(weights="clip"), "Did you mean rule 'clipped'"),
        (lambda: React(mask="rond"), "Did you mean mask 'round'"),
        (lambda: React(state_lr=-1), "react.state_lr: expected a factor >= 0"),
        (lambda: build_estimator("ede", {"k": 1}), "options of method 'ede'"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("method", "scheme", "options"),
    [
        ("ste", "w4a16-g8", {"mask": "round"}),
        ("ste", "w2a8-channel", {"mask": "none", "learn_scale": True}),
        ("bireal", "w1a16-channel", {}),
        ("bireal", "w2a4-channel-static", {"weights": "clipped"}),
        ("react", "w2a4-channel-static", {"mask": "none"}),
        ("ede", "w2a16-channel", {"balance": False}),
        ("ede", "w1a16-channel", {}),
    ],
)
def test_short_run(method, scheme, options, tmp_path):
    whole = check_run(lambda: Run(method, scheme, lr=0.02, **options), drop=0.9)
    if "a16" in scheme:
        check_folded(whole, tmp_path / "out")


def test_convolutions_train_too():
    for method in ("bireal", "react", "ede"):
        check_run(lambda method=method: Run(method, "w2a4", convolutional(), lr=0.02), drop=1.0)


def test_shift_has_a_group_of_its_own_and_moves():
    whole = Run("react", "w2a4-channel-static").steps(0, 20)
    shifts = [p for n, p in whole.model.named_parameters() if n.endswith("shift")]
    assert len(shifts) == 2
    assert all(p.abs().max() > 0 for p in shifts)
    assert set(dict(whole.model[0].input_quant.estimator.learned(whole.model[0].input_quant))) == {"shift"}
    assert whole.controller.metrics()["shift"] > 0


def test_react_gradients_with_learned_scale_against_the_oracle():
    """The contract's own checks start from shifts of many sizes; here one moves a value across the range's end."""
    q, x = quantizer_of(React(), "static", torch.float64, bits=2)
    q.shift.data.uniform_(-2, 2)
    g = torch.randn_like(x)
    q(x).backward(g)
    _, _, ranges, state = expected("react", q, x, g)
    np.testing.assert_allclose(q.shift.grad.numpy(), state["shift"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(q.scale.grad.numpy(), ranges["scale"], rtol=1e-10)
