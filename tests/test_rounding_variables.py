"""AdaRound's formulas by hand, and what its kin optimize."""

import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.rounding import round_model
from lightning_quant.rounding.held import Held
from lightning_quant.rounding.variables import (
    MovedWeight,
    SoftRounding,
    annealed,
    inverse_rectified_sigmoid,
    penalty_gradient,
    rectified_sigmoid,
)


def held(weight, scale, scheme="w3a16-channel"):
    layer = nn.Linear(len(weight), 1)
    attach(nn.Sequential(layer), QuantConfig.parse("ste", scheme))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
        layer.weight_quant.scale.fill_(scale)
    return Held(layer, "0")


def test_start_is_the_float_weight():
    v = SoftRounding(held([0.37], 0.25))
    assert v.floor.item() == 1
    assert v.v.item() == pytest.approx(-0.06669137, abs=1e-6)
    assert rectified_sigmoid(v.v).item() == pytest.approx(0.48, abs=1e-6)
    assert v.rows().item() == pytest.approx(0.37)
    assert v.codes().item() == 1


def test_inverse():
    h = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert torch.allclose(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)


def penalty(h, beta):
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


@pytest.mark.parametrize(("beta", "want"), [(20.0, 0.98847078), (2.0, 0.36)])
def test_penalty(beta, want):
    assert penalty(torch.tensor([0.1], dtype=torch.float64), beta).item() == pytest.approx(want)
    v = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    penalty(rectified_sigmoid(v), beta).backward()
    assert torch.allclose(penalty_gradient(v, beta), v.grad)
    assert penalty_gradient(v, beta)[0] == 0


def test_annealing():
    assert [annealed(t, 10000) for t in (0, 1999, 2000, 6000, 10000)] == [20.0, 20.0, 20.0, 11.0, 2.0]


def test_soft_weights_stay_between_the_levels_around_them():
    grid = held([-0.9, -0.3, 0.1, 0.74], 0.25)
    v = SoftRounding(grid)
    with torch.no_grad():
        v.v.fill_(50.0)
    up = v.rows()
    with torch.no_grad():
        v.v.fill_(-50.0)
    down = v.rows()
    assert torch.allclose(up, torch.tensor([[-0.75, -0.25, 0.25, 0.75]]))
    assert torch.allclose(down, torch.tensor([[-1.0, -0.5, 0.0, 0.5]]))


def test_values_beyond_the_grid_take_its_ends():
    v = SoftRounding(held([-9.0, 9.0], 0.25))
    assert v.codes().tolist() == [[-4.0, 3.0]]
    assert torch.allclose(v.rows(), torch.tensor([[-1.0, 0.75]]))


def test_soft_rounding_on_a_codebook_starts_at_the_weight():
    layer = nn.Linear(64, 4)
    attach(nn.Sequential(layer), QuantConfig.parse("ste", "nf4-g32"))
    v = SoftRounding(Held(layer, "0"))
    assert torch.allclose(v.rows(), layer.weight, atol=1e-6)
    assert torch.equal(v.codes(), v.held.nearest(v.held.rows))


def test_a_moved_weight_is_on_the_grid_with_the_straight_through_gradient():
    v = MovedWeight(held([0.3, -0.6], 0.25))
    rows = v.rows()
    assert rows.tolist() == [[0.25, -0.5]]
    rows.sum().backward()
    assert v.v.grad.tolist() == [[0.25, 0.25]]
    with torch.no_grad():
        v.v.fill_(1.0)
    assert v.codes().tolist() == [[2.0, -1.0]]


@pytest.mark.parametrize("rounding", ["adaround", "adaquant", "brecq", "qdrop"])
def test_outputs_come_closer_than_to_nearest(rounding):
    mix = torch.randn(32, 32)
    batches = [torch.randn(64, 32) @ mix for _ in range(4)]
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {} if rounding == "adaquant" else {"iterations": 150, "lr": 0.1}
    report = round_model(model, QuantConfig.parse("ste", "w2a16-channel"), batches, rounding, **options)
    assert list(report.errors) == ["0", "2"]
    for before, after in report.errors.values():
        assert after < 0.9 * before


def test_codes_that_are_worse_than_the_nearest_are_not_kept():
    model = nn.Sequential(nn.Linear(16, 8))
    config = QuantConfig.parse("ste", "w3a16-channel")
    report = round_model(model, config, [torch.randn(8, 16)], "adaquant", iterations=3, lr=3.0)
    ((before, after),) = report.errors.values()
    assert after == before


def test_runs_repeat_with_their_seed():
    def run(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        batches = [torch.randn(8, 16) for _ in range(4)]
        config = QuantConfig.parse("ste", "w2a16-channel")
        round_model(model, config, batches, "adaround", seed=seed, iterations=30, lr=0.05)
        return model.state_dict()

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(
    ("rounding", "options", "message"),
    [
        ("gtpq", {}, r"rounding: expected one of .*got 'gtpq'\. Did you mean rounding 'gptq'\?"),
        ("gptq", {"dampning": 0.1}, r"rounding 'gptq': expected one of .*Did you mean option 'damping'\?"),
        ("rtn", {"damping": 0.1}, r"rounding 'rtn': expected one of \(none\), got 'damping'"),
        ("gptq", {"damping": 0.0}, r"gptq: expected damping > 0 and block > 0, got damping=0.0"),
        ("brecq", {"iterations": 0}, r"brecq: expected iterations >= 1"),
    ],
)
def test_settings_are_checked(rounding, options, message):
    with pytest.raises(ValueError, match=message):
        round_model(nn.Linear(4, 4), QuantConfig.parse("ste", "w4a16"), [torch.ones(1, 4)], rounding, **options)
