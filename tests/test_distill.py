"""Distillation without a framework: gradients against hand values and a float64 oracle, and what a teacher leaves."""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from contextlib import nullcontext
from operator import itemgetter

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_quant import QuantConfig, QuantController, attach, soft_targets
from lightning_quant.attach import quantizers
from lightning_quant.bypass import bypassed, evaluating
from lightning_quant.distill import Distiller
from lightning_quant.errors import AttachError, CoverageError
from lightning_quant.outputs import shares
from lightning_quant.soft_targets import AddGradient, soft_target_gradient, square_gradient
from lightning_quant.spec import Distill

F64 = torch.float64


def written(z, y, counts, temperature):
    """T^2 KL(teacher || student), a mean over the positions that count, classes last."""
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (y, z))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * (rows * counts).sum() / counts.sum()


# The formulas


def test_hand_values():
    """z = (0, 0) says 1/2, 1/2; y = (ln 3, 0) says 3/4, 1/4."""
    z, y = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    gradient, value = soft_target_gradient(z, y, torch.ones(1), 1.0, measure=True)
    assert gradient.tolist() == [pytest.approx([-0.25, 0.25])]
    assert float(value) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    softer, none = soft_target_gradient(z, 2 * y, torch.full((1,), 0.5), 2.0, scale=8.0)
    assert softer.tolist() == [pytest.approx([-2.0, 2.0])]  # T w (q - p) times the scale: 2 * 0.5 * 0.25 * 8
    assert none is None
    gradient, value = square_gradient(torch.tensor([[3.0, 1.0]]), torch.ones(1, 2), torch.full((1,), 0.5), measure=True)
    assert gradient.tolist() == [[1.0, 0.0]]  # 2 * 0.5 / 2 * (3 - 1)
    assert float(value) == 1.0


@pytest.mark.parametrize("chunk", [1, 35, 2**22])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradients_are_those_of_autograd(monkeypatch, chunk, temperature):
    monkeypatch.setattr(soft_targets, "CHUNK", chunk)  # 1, 5 and all of 13 rows at a time
    z, y = torch.randn(13, 7, dtype=F64, requires_grad=True), torch.randn(13, 7, dtype=F64)
    counts = (torch.arange(13) % 3 > 0).to(F64)
    want = written(z, y, counts, temperature)
    gradient, value = soft_target_gradient(z, y, counts / counts.sum(), temperature, 4.0, measure=True)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(gradient, 4 * torch.autograd.grad(want, z)[0])
    want = ((z - y).square().mean(-1) * counts).sum() / counts.sum()
    gradient, value = square_gradient(z, y, counts / counts.sum(), torch.tensor(4.0), measure=True)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(gradient, 4 * torch.autograd.grad(want, z)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_outputs_are_softened_in_float32(dtype):
    z, y = (8 * torch.randn(5, 300)).to(dtype), (8 * torch.randn(5, 300)).to(dtype)
    gradient, value = soft_target_gradient(z, y, torch.full((5,), 0.2), 2.0, measure=True)
    exact, want = soft_target_gradient(z.to(F64), y.to(F64), torch.full((5,), 0.2, dtype=F64), 2.0, measure=True)
    assert gradient.dtype is dtype
    torch.testing.assert_close(gradient.to(F64), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert float(value) == pytest.approx(float(want), rel=1e-5)


def test_classes_masked_with_minus_infinity_add_nothing():
    z, y = torch.randn(4, 6), torch.randn(4, 6)
    bare, small = soft_target_gradient(z, y, torch.full((4,), 0.25), 1.0, measure=True)
    wall = torch.full((4, 2), -math.inf)
    gradient, value = soft_target_gradient(
        torch.cat([z, wall], 1), torch.cat([y, wall], 1), torch.full((4,), 0.25), 1.0, measure=True
    )
    torch.testing.assert_close(gradient, torch.cat([bare, torch.zeros(4, 2)], 1))
    torch.testing.assert_close(value, small)


@pytest.mark.parametrize("by", ["loss", "logits", "both", "logits changed in place"])
def test_gradient_is_added_once_whatever_the_loss_is_made_of(by):
    x = torch.randn(3, 4, requires_grad=True)
    extra, noted = torch.randn(3, 4), []
    logits = x * 2.0
    loss = logits.exp().sum()
    logits, loss = AddGradient.apply([extra, None], lambda: noted.append(1), logits, loss)
    task = {
        "loss": lambda: loss,
        "logits": lambda: (3 * logits).sum(),
        "both": lambda: loss + (3 * logits).sum(),
        "logits changed in place": lambda: logits.mul_(3).sum(),
    }[by]()
    task.backward(retain_graph="place" not in by)
    of_loss = 2 * (2 * x.detach()).exp() * (by in ("loss", "both"))
    torch.testing.assert_close(x.grad, of_loss + 6.0 * (by != "loss") + 2 * extra)
    if "place" not in by:
        first, x.grad = x.grad, None
        task.backward()
        assert torch.equal(x.grad, first)
    assert set(noted) == {1}


# What a forward returns


class Net(nn.Module):
    """A classifier of every position with dropout and normalization, returned in some form."""

    def __init__(self, form="tensor", classes=6, momentum=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12, momentum=momentum)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(12, classes)
        self.form = form

    def forward(self, x, labels=None, attention_mask=None, output_hidden_states=False):
        hidden = torch.tanh(self.norm(self.body(x).flatten(0, -2)).reshape(*x.shape[:-1], 12))
        logits = self.head(self.drop(hidden))
        if self.form == "tensor":
            return logits
        if self.form == "map":
            return logits.movedim(-1, 1)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        if self.form == "dict":
            states = (x, hidden) if output_hidden_states else None
            return {"loss": loss, "logits": logits, "hidden_states": states}
        if self.form == "named":
            return namedtuple("Output", "logits extra")(logits, "more")
        return {"tuple": tuple, "list": list}[self.form](v for v in (loss, logits) if v is not None)


def run(model, distill=None, teacher=None, scheme="w4a16-channel", method="ste", **options):
    controller = QuantController(QuantConfig.parse(method, scheme, distill=distill, **options), teacher)
    controller.prepare(model)
    controller.begin(10)
    model.train()
    return controller


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def taught(model, *args, **kwargs):
    """What the free teacher says."""
    with torch.no_grad(), bypassed(model), evaluating(model):
        return model(*args, **kwargs)


def logits_of(form, output, loss=True):
    """The logits, classes last, in what a forward returned beside its loss or without it."""
    if form in ("tensor", "map"):
        return output if form == "tensor" else output.movedim(1, -1)
    return output["logits"] if form == "dict" else output[0 if form == "named" or not loss else 1]


@pytest.mark.parametrize("form", ["tensor", "map", "dict", "named", "tuple", "list"])
def test_every_form_of_output(form):
    model = Net(form).double()
    controller = run(model, {"weight": 0.7, "temperature": 2.0})
    shape = (4, 3, 2) if form == "map" else (4, 3)
    x, answers = torch.randn(*shape, 8, dtype=F64), torch.randint(6, shape)
    inside = form in ("dict", "tuple", "list")  # the loss is computed in the forward
    kwargs = {"labels": answers} if inside else {}

    def loss(output):
        if inside:
            return output["loss"] if form == "dict" else output[0]
        return F.cross_entropy(logits_of(form, output).flatten(0, -2), answers.flatten())

    plain = model(x, **kwargs)
    logits, y = logits_of(form, plain), logits_of(form, taught(model, x), loss=False)
    assert (y - logits).abs().max() > 0.01
    want = 0.7 * written(logits, y, torch.ones_like(logits[..., 0]), 2.0)
    (loss(plain) + want).backward()
    expected = gradients(model)
    controller.on_step(0, measure=True)
    output = model(x, **kwargs)
    assert type(output).__name__ == type(plain).__name__
    loss(output).backward()
    same(gradients(model), expected)
    assert controller.metrics()["distill"] == pytest.approx(float(want.detach()))


@pytest.mark.parametrize("mask", ["labels", "attention_mask", "both"])
def test_positions_that_count(mask):
    model = Net("dict").double()
    controller = run(model, 0.5)
    x, counts = torch.randn(4, 5, 8, dtype=F64), torch.rand(4, 5) < 0.6
    kwargs = {"attention_mask": (torch.zeros(4, 5) if mask == "both" else counts).long()}
    if mask != "attention_mask":
        kwargs["labels"] = torch.where(counts, 1, -100)
    plain = model(x, **kwargs)
    loss = plain["logits"].square().mean()
    (loss + 0.5 * written(plain["logits"], taught(model, x)["logits"], counts.to(F64), 1.0)).backward()
    expected = gradients(model)
    controller.on_step(0)
    model(x, **kwargs)["logits"].square().mean().backward()
    same(gradients(model), expected)


def test_no_position_counts():
    model = Net("dict").double()
    controller = run(model, 0.5)
    kwargs = {"labels": torch.full((4, 5), -100), "attention_mask": torch.ones(4, 5)}
    controller.on_step(0, measure=True)
    model(torch.randn(4, 5, 8, dtype=F64), **kwargs)["logits"].sum().backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert controller.metrics()["distill"] == 0.0


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_hidden_states(weight):
    model = Net("dict").double()
    controller = run(model, {"weight": weight, "hidden": 0.3})
    x, counts = torch.randn(4, 5, 8, dtype=F64), torch.rand(4, 5) < 0.6
    kwargs = {"labels": torch.where(counts, 1, -100)}
    plain, other = model(x, **kwargs, output_hidden_states=True), taught(model, x, output_hidden_states=True)
    states = itemgetter("hidden_states")
    off = [(a - b).square().mean(-1)[counts].mean() for a, b in zip(states(plain), states(other), strict=True)]
    term = 0.3 * sum(off) / 2 + weight * written(plain["logits"], other["logits"], counts.to(F64), 1.0)
    (plain["loss"] + term).backward()
    expected = gradients(model)
    controller.on_step(0, measure=True)
    model(x, **kwargs)["loss"].backward()
    same(gradients(model), expected)
    assert controller.metrics()["distill"] == pytest.approx(float(term.detach()))


def test_hidden_states_of_a_model_that_has_none():
    model = Net("named")
    controller = run(model, {"hidden": 1.0})
    controller.on_step(0)
    with pytest.raises(ValueError, match=r"Distill.hidden: expected hidden_states .* got Output. Leave out hidden"):
        model(torch.randn(4, 5, 8))


def test_shares_without_a_transformer_are_position_by_position():
    labels = torch.tensor([[1, -100, 2, -100]])
    assert shares(nn.Identity(), {"labels": labels}, torch.zeros(1, 4, 9)).tolist() == [[0.5, 0, 0.5, 0]]
    assert shares(nn.Identity(), {"labels": labels[0]}, torch.zeros(1, 4, 9)).tolist() == [[0.25] * 4]


# The training loop


def train(distill, by_hand=False, accumulate=1, scaled=False, steps=4):
    """Losses and weights at the end, with the term injected or written into the loss."""
    model = Net(momentum=0.1).double()
    weight, temperature = 0.7, 2.0
    controller = run(model, {"weight": weight, "temperature": temperature} if distill else None, method="lsq")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        for _ in range(accumulate):
            x, t = torch.randn(8, 8, dtype=F64, generator=generator), torch.randint(6, (8,), generator=generator)
            controller.on_step(step, scaler.get_scale() / accumulate)
            z = model(x)
            loss = F.cross_entropy(z, t)
            losses.append(float(loss.detach()))
            if by_hand:
                loss = loss + weight * written(z, taught(model, x), torch.ones(8), temperature)
            scaler.scale(loss / accumulate).backward()
        controller.before_optimizer_step(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        controller.after_optimizer_step()
    return losses, model.state_dict()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_injected_is_written(accumulate, scaled):
    (losses, state), (want, other) = (train(on, not on, accumulate=accumulate, scaled=scaled) for on in (True, False))
    assert losses == pytest.approx(want, rel=1e-9)
    same(state, other, rtol=1e-8, atol=1e-10)
    assert losses[-1] != pytest.approx(train(False, accumulate=accumulate)[0][-1], rel=1e-3)


def test_saved_for_backward_is_one_tensor_of_logits():
    """A vocabulary of 32 thousand at 512 positions; the loss is left out, which keeps a tensor or two of its own."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2**15, bias=False)

        def forward(self, x):
            return self.head(x).to(torch.bfloat16)

    saved = []
    model = Wide()
    controller = run(model, {"weight": 1.0, "temperature": 2.0})
    x = torch.randn(512, 4)

    def kept(tensor):
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
        model(x)
        plain = sum(saved)
        saved.clear()
        controller.on_step(0)
        y = model(x)
    assert sum(saved) - plain <= y.numel() * y.element_size() == 2**25


def test_separate_teacher_is_left_as_it_was():
    model, teacher = Net().double(), Net().double()
    with torch.no_grad():
        teacher.head.weight.mul_(3)
    teacher.body.eval()
    before, flags = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    x, t = torch.randn(8, 8, dtype=F64), torch.randint(6, (8,))
    controller = run(model, 2.0, teacher)
    z = model(x)
    (F.cross_entropy(z, t) + 2 * written(z, copy.deepcopy(teacher).eval()(x), torch.ones(8), 1.0)).backward()
    expected = gradients(model)
    controller.on_step(0)
    F.cross_entropy(model(x), t).backward()
    same(gradients(model), expected)
    assert [m.training for m in teacher.modules()] == flags
    assert not gradients(teacher)
    same(teacher.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in teacher.parameters())


def test_separate_teacher_for_another_task():
    model = Net()
    controller = run(model, 1.0, Net(classes=5))
    controller.on_step(0)
    with pytest.raises(ValueError, match=r"expected logits of shape \(4, 6\), as the model's, got .* \(4, 5\)"):
        model(torch.randn(4, 8))


def test_nothing_moves_but_gradients():
    """Statistics, ranges, coverage, random numbers and evaluation are those of a run without a teacher."""

    def steps(distill):
        model = Net(momentum=0.1)
        model.drop.p = 0.5
        controller = run(model, distill, scheme="w4a8-channel-static", calibration=2)
        torch.manual_seed(5)
        for step in range(2):
            controller.on_step(step)
            z = model(torch.randn(8, 8))
            z.sum().backward()
            if distill:
                assert all(m.training for m in model.modules())
            controller.after_optimizer_step()
        controller.on_eval()
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        return z.detach(), torch.get_rng_state(), dict(model.state_dict()), model.eval()(torch.ones(2, 8)).detach()

    for a, b in zip(steps(None), steps(5.0), strict=True):
        same(a, b, rtol=0, atol=0) if isinstance(a, dict) else torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast_casts_of_the_teacher_are_not_trained_with():
    """A layer that training skips in one forward and not in the next, as LayerDrop does."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, keep):
            x = self.first(x)
            return self.second(x) if keep or not self.training else x

    model = Dropped()
    rules = [{"match": "second", "weight": None}]
    config = QuantConfig.from_dict({"version": 1, "method": "ste", "activation": None, "rules": rules, "distill": 1.0})
    controller = QuantController(config)
    controller.prepare(model)
    controller.begin(1)
    model.train()
    controller.on_step(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 8), False).square().mean() + model(torch.randn(4, 8), True).square().mean()
    loss.backward()
    assert model.second.weight.grad is not None


def test_float_phase_of_a_delay_has_no_teacher():
    model = Net()
    controller = run(model, 1.0, method="lsq", delay=2)
    found = []
    for step in range(4):
        controller.on_step(step, measure=True)
        model(torch.randn(8, 8)).square().mean().backward()
        controller.after_optimizer_step()
        found.append("distill" in controller.metrics())
    assert found == [False, False, True, True]


def test_only_measured_steps_compute_the_value():
    model = Net()
    controller = run(model, 1.0)
    for step, measure in enumerate((True, False, True)):
        controller.on_step(step, measure=measure)
        model(torch.randn(8, 8)).sum().backward()
        assert ("distill" in controller.metrics()) == measure


def test_curvature_is_that_of_the_task():
    def delta(distill):
        model = Net().double()
        controller = run(model, distill, scheme="w4a16-channel", method="ewgs", delta="hessian")
        x, t = torch.randn(8, 8, dtype=F64), torch.randint(6, (8,), generator=torch.Generator().manual_seed(0))
        controller.on_step(5)
        controller.update_curvature(lambda: F.cross_entropy(model(x), t))
        if distill:
            assert model._forward_hooks
        return {path: q.delta.clone() for path, q in quantizers(model)}

    def one(distill):
        torch.manual_seed(0)
        return delta(distill)

    assert all(d > 0 for d in one(None).values())
    same(one(None), one(3.0), rtol=0, atol=0)


# Bypassing


@pytest.mark.parametrize("batch_norm", ["keep", "two_pass", "frozen"])
def test_bypassed_model_is_the_float_model(batch_norm):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(9, 3 * 8 * 8)
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.skip, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, i):
            x = self.embed(i).view(-1, 3, 8, 8)
            return self.head((self.norm(self.conv(x)) + self.skip(x)).mean((2, 3)))

    model = Branches().double()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    i = torch.arange(9)
    want = model.eval()(i)
    attach(model, QuantConfig.parse("lsq", "w2a4", batch_norm=batch_norm, operators=4, embeddings=True))
    for _, q in quantizers(model):
        q.observing = not q.is_weight
    with bypassed(model):
        torch.testing.assert_close(model(i), want)
        assert not any(q.called or q.noted is not None for _, q in quantizers(model))
    assert not torch.allclose(model(i), want, atol=1e-2)
    assert all(q.called for _, q in quantizers(model))


def test_bypass_ends_with_an_error_and_nests():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    attach(model, QuantConfig.parse("ste", "w2a16-channel"))
    model[1].eval()
    with pytest.raises(RuntimeError, match="boom"), bypassed(model), evaluating(model), bypassed(model):
        raise RuntimeError("boom")
    assert all(q.enabled for _, q in quantizers(model))
    assert [m.training for m in model] == [True, False, True]
    with bypassed(model):
        with bypassed(model):
            pass
        assert not any(q.enabled for _, q in quantizers(model))


# Settings and complaints


@pytest.mark.parametrize("how", ["error", "warn", "off"])
@pytest.mark.parametrize("loss", ["another module", "outputs unused", "frozen", "no logits"])
def test_loss_that_no_teacher_reaches(how, loss):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(8, 6)

        def forward(self, x):
            y = self.net(x)
            return y.detach() if loss == "frozen" else y.sum() if loss == "no logits" else y

    got = {
        "another module": "no call of it",
        "outputs unused": "outputs that it does not depend on",
        "frozen": "outputs that it does not depend on",
        "no logits": r"a tensor of shape \(\), in which there are no logits",
    }[loss]
    model = Outer()
    controller = run(model, 1.0, coverage=how)
    controller.on_step(0)
    x = torch.randn(4, 8)
    if loss in ("outputs unused", "frozen"):
        model(x)
    (model(x) if loss == "no logits" else model.net(x)).sum().backward()
    message = f"Distill.module: expected the loss to come from the outputs of Outer, got {got}. .*'module': 'net'"
    complaint = {
        "error": pytest.raises(CoverageError, match=message),
        "warn": pytest.warns(UserWarning, match=message),
        "off": nullcontext(),
    }[how]
    with complaint:
        controller.after_optimizer_step()
    controller.after_optimizer_step()  # once


def test_part_whose_outputs_are_taught():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 6))})
    controller = run(model, {"module": "net"})
    controller.on_step(0, measure=True)
    model["net"](torch.randn(4, 8)).sum().backward()
    controller.after_optimizer_step()
    assert controller.metrics()["distill"] > 0
    with pytest.raises(AttachError, match=r"expected the path of a submodule .* got 'nets'. Nearest: net"):
        run(nn.ModuleDict({"net": nn.Linear(8, 6)}), {"module": "nets"})


def test_a_call_around_a_call_is_taught_once():
    """Wrappers send a training step through the module's own call, in which it is called again."""

    class Redirected(Net):
        def forward(self, x, again=False):
            return self(x) * 1.0 if again else super().forward(x)

    model = Redirected().double()
    distiller = Distiller(Distill(1.0))
    attach(model, QuantConfig.parse("ste", "w4a16-channel"))
    distiller.find(model)
    distiller.open(1.0, False)
    x = torch.randn(4, 8, dtype=F64)
    model(x).sum().backward()
    once = gradients(model)
    model(x, again=True).sum().backward()
    same(gradients(model), once)
    distiller.close()
    model(x).sum().backward()
    assert not torch.equal(gradients(model)["head.weight"], once["head.weight"])


def test_settings(tmp_path):
    config = QuantConfig.parse("ste", "w4a16", distill={"weight": 0.5, "temperature": 2})
    assert config.distill == Distill(0.5, 2)
    config.to_yaml(tmp_path / "c.yaml")
    assert QuantConfig.from_yaml(tmp_path / "c.yaml") == config
    (tmp_path / "c.yaml").write_text("version: 1\ndistill: 0.25\n")
    assert QuantConfig.from_yaml(tmp_path / "c.yaml").distill == Distill(0.25)
    assert QuantConfig.parse("ste", "w4a16", distill=0).distill is None
    assert QuantConfig.parse("ste", "w4a16").distill is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weigth": 1}, "QuantConfig.distill: .* got 'weigth'. Did you mean key 'weight'"),
        ("1", "QuantConfig.distill: expected a weight or a mapping of Distill's fields, got '1'"),
        (-1.0, "Distill.weight: expected a number from 0 on, got -1.0"),
        (math.nan, "Distill.weight"),
        ({"temperature": 0}, "Distill.temperature: expected a number from 0.001 on, got 0"),
        ({"hidden": "a"}, "Distill.hidden: expected a number from 0 on, got 'a'"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ValueError, match=message):
        QuantConfig.parse("ste", "w4a16", distill=given)


def test_teacher_that_nothing_learns_from():
    with pytest.raises(ValueError, match=r"QuantConfig.distill: expected a weight for what the teacher says, got None"):
        QuantController(QuantConfig.parse("ste", "w4a16"), nn.Linear(2, 2))
