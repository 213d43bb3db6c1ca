"""Quantizer parameters train in groups of their own, and every scheduler follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from lightning_quant.attach import attach, quantizers
from lightning_quant.optim import freeze_with_weights, learned_parameters, param_groups, split_groups
from lightning_quant.spec import QuantConfig

CONFIG = QuantConfig.parse("pege", "w4a16-channel", scale_lr=0.25, state_lr=4.0)
FACTORS = (0.25, 4.0)  # scales, Theta


def attached(config=CONFIG):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    attach(model, config)
    return model


def train(model, optimizer, scheduler=None, steps=1, loss=1.0):
    rates = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(loss)
        elif scheduler is not None:
            scheduler.step()
        rates.append([g["lr"] for g in optimizer.param_groups])
    return rates


def names(model, group):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_groups_hold_what_they_should():
    model = attached()
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    split_groups([optimizer], [], model, CONFIG)
    own, scales, thetas = optimizer.param_groups
    assert names(model, own) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert names(model, scales) == {"0.weight_quant.scale", "1.weight_quant.scale"}
    assert names(model, thetas) == {"0.weight_quant.theta", "1.weight_quant.theta"}
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 2.5e-3, 4e-2]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert all(g["betas"] == (0.8, 0.9) for g in optimizer.param_groups)


def test_splitting_again_changes_nothing():
    model = attached()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    split_groups([optimizer], [], model, CONFIG)
    before = [(names(model, g), g["lr"]) for g in optimizer.param_groups]
    split_groups([optimizer], [], model, CONFIG)
    assert [(names(model, g), g["lr"]) for g in optimizer.param_groups] == before


def test_every_group_is_split_with_its_own_rate():
    model = attached()
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[1].parameters(), "lr": 0.5}]
    optimizer = SGD(groups, lr=9.0, weight_decay=0.1)
    split_groups([optimizer], [], model, CONFIG)
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 0.5, 0.25, 4.0, 0.125, 2.0]
    assert names(model, optimizer.param_groups[4]) == {"1.weight_quant.scale"}


def test_weight_decay_does_not_touch_quantizers():
    model = attached()
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    split_groups([optimizer], [], model, CONFIG)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == ("_quant." in n or not before[n].any()), n


def test_tensor_learning_rate():
    model = attached()
    optimizer = AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False)
    split_groups([optimizer], [], model, CONFIG)
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([1e-2, 2.5e-3, 4e-2])
    assert len({id(g["lr"]) for g in optimizer.param_groups}) == 3  # schedulers fill them in place
    train(model, optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.LambdaLR(o, lambda t: 0.9**t)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=1e-5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_the_ratio_and_the_model_s_own_rate(name):
    model, plain = attached(), nn.Linear(8, 2)
    optimizer, reference = AdamW(model.parameters(), lr=1e-2), AdamW(plain.parameters(), lr=1e-2)
    scheduler, other = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    split_groups([optimizer], [scheduler], model, CONFIG)
    rates, expected = train(model, optimizer, scheduler, steps=7), train(plain, reference, other, steps=7)
    for (own, scales, thetas), (want,) in zip(rates, expected, strict=True):
        assert own == pytest.approx(want)
        assert scales == pytest.approx(want * FACTORS[0])
        assert thetas == pytest.approx(want * FACTORS[1])
    assert len({r[0] for r in rates}) > 1
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    if name != "ReduceLROnPlateau":
        assert len(scheduler.get_last_lr()) == 3


def test_cycled_momentum_is_that_of_the_origin():
    model = attached()
    optimizer = SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scheduler = lr_scheduler.CyclicLR(optimizer, 0.001, 0.02, step_size_up=3)
    split_groups([optimizer], [scheduler], model, CONFIG)
    train(model, optimizer, scheduler, steps=2)
    momenta = [g["momentum"] for g in optimizer.param_groups]
    assert 0.8 <= momenta[0] < 0.9
    assert momenta == [momenta[0]] * 3


def test_split_in_the_middle_of_a_schedule():
    model = attached()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    train(model, optimizer, scheduler, steps=2)
    split_groups([optimizer], [scheduler], model, CONFIG)
    assert train(model, optimizer, scheduler)[0] == pytest.approx([0.125e-2, 0.25 * 0.125e-2, 4 * 0.125e-2])


def test_optimizer_state_survives_a_save_and_a_load():
    model = attached()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    split_groups([optimizer], [], model, CONFIG)
    train(model, optimizer, steps=2)
    twin = AdamW(model.parameters(), lr=1e-2)
    split_groups([twin], [], model, CONFIG)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    assert [g["lr"] for g in twin.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_only_the_scheduler_of_the_same_optimizer_follows():
    model = attached()
    one, two = AdamW(model[0].parameters(), lr=1e-2), AdamW(model[1].parameters(), lr=1e-3)
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (one, two)]
    split_groups([one, two], schedulers, model, CONFIG)
    assert [s.base_lrs for s in schedulers] == [[1e-2, 2.5e-3, 4e-2], [1e-3, 2.5e-4, 4e-3]]


def test_parameters_in_no_optimizer_join_the_one_that_holds_their_layer_s_weight():
    model = attached(QuantConfig.parse("pege", "w4a8-channel", scale_lr=0.25, state_lr=4.0))
    groups = [{"params": [model[1].weight], "lr": 0.5}, {"params": [model[0].bias, model[1].bias], "lr": 9.0}]
    one, two = SGD(groups, lr=1.0, weight_decay=0.1), AdamW([model[0].weight], lr=1e-2, betas=(0.8, 0.9))
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (one, two)]
    split_groups([one, two], schedulers, model, CONFIG)
    states = {f"{q}.{s}" for q in ("weight_quant", "input_quant") for s in ("theta",)} | {"weight_quant.scale"}
    for optimizer, layer, lr in ((one, 1, 0.5), (two, 0, 1e-2)):
        scales, thetas = optimizer.param_groups[-2:]
        assert names(model, scales) | names(model, thetas) == {f"{layer}.{name}" for name in states}
        assert [g["lr"] for g in (scales, thetas)] == [lr * f for f in FACTORS]
        assert [g["weight_decay"] for g in (scales, thetas)] == [0.0, 0.0]
    assert two.param_groups[-1]["betas"] == (0.8, 0.9)
    assert [s.base_lrs for s in schedulers] == [[0.5, 9.0, 0.125, 2.0], [1e-2, 2.5e-3, 4e-2]]
    rates = train(model, two, schedulers[1], steps=2)
    assert rates[1] == pytest.approx([2.5e-3, 0.25 * 2.5e-3, 4 * 2.5e-3])
    split_groups([one, two], schedulers, model, CONFIG)
    assert [len(o.param_groups) for o in (one, two)] == [4, 3]


def test_parameters_of_a_layer_that_no_optimizer_holds():
    model = attached()
    message = (
        r"0.weight_quant.scale: expected every learned quantizer parameter, or the weight of its layer, in an "
        r"optimizer, got 2 in none \(0.weight_quant.scale, 0.weight_quant.theta\)\. Give the optimizer .*param_groups"
    )
    with pytest.raises(ValueError, match=message):
        split_groups([AdamW([model[1].weight, model[0].bias])], [], model, CONFIG)


def test_quantizers_of_frozen_weights_are_frozen():
    model = attached(QuantConfig.parse("pege", "w4a8-channel"))
    model[0].weight.requires_grad_(False)
    freeze_with_weights(model)
    assert not any(p.requires_grad for q in (model[0].weight_quant, model[0].input_quant) for p in q.parameters())
    assert all(p.requires_grad for q in (model[1].weight_quant, model[1].input_quant) for p in q.parameters())
    assert model[0].bias.requires_grad
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    split_groups([optimizer], [], model, CONFIG)
    assert len(optimizer.param_groups) == 3


def test_quantizers_of_a_frozen_weight_with_a_trained_factor_are_learned():
    """A folded normalization's gamma is part of what is rounded."""
    config = QuantConfig.parse("lsq", "w4a16", batch_norm="two_pass")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    attach(model, config)
    freeze_with_weights(model)
    assert model[0].weight_quant.scale.requires_grad
    assert not model[2].weight_quant.scale.requires_grad
    optimizer = AdamW(model[1].parameters(), lr=1e-2)
    split_groups([optimizer], [], model, config)
    assert names(model, optimizer.param_groups[1]) == {"0.weight_quant.scale"}


def test_frozen_parameters_need_no_optimizer():
    model = attached()
    for _, q in quantizers(model):
        q.requires_grad_(False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    split_groups([optimizer], [], model, CONFIG)
    assert len(optimizer.param_groups) == 1
    assert learned_parameters(model, CONFIG) == {}


def test_methods_that_learn_nothing_leave_the_optimizer_alone():
    config = QuantConfig.parse("ste", "w4a16-channel")
    model = attached(config)
    optimizer = AdamW(model.parameters())
    split_groups([optimizer], [], model, config)
    assert len(optimizer.param_groups) == 1


def test_param_groups_for_a_hand_written_loop():
    model = attached()
    groups = param_groups(model, CONFIG, lr=1e-2, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-2, 0.1), (2.5e-3, 0.0), (4e-2, 0.0)]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    train(model, AdamW(groups))


def test_groups_made_by_hand_are_not_scaled_twice():
    model = attached()
    optimizer = AdamW(param_groups(model, CONFIG, lr=1e-2))
    split_groups([optimizer], [], model, CONFIG)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 2.5e-3, 4e-2]
