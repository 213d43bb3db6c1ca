"""A training loop of a few steps on a toy problem, driven as the front ends drive one."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import nn

from lightning_quant import QuantConfig
from lightning_quant.controller import QuantController
from lightning_quant.export import export


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def convolutional() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 2))


def batch(model):
    """Inputs and a teacher's answers."""
    generator = torch.Generator().manual_seed(1)
    linear = isinstance(model[0], nn.Linear)
    x = torch.randn((64, 8) if linear else (16, 3, 6, 6), generator=generator)
    teacher = nn.Linear(x[0].numel(), 4 if linear else 2 * 4 * 4)
    with torch.no_grad():
        for p in teacher.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
        y = torch.relu(teacher(x.flatten(1)))
    return x, y if linear else y.reshape(16, 2, 4, 4)


class Run:
    """A model in training: ``losses`` grows by one per optimizer step."""

    def __init__(self, method, scheme, model=None, total=40, lr=0.01, optimizer=None, **options):
        self.model = model or mlp()
        self.controller = QuantController(QuantConfig.parse(method, scheme, **options))
        self.controller.prepare(self.model)
        self.controller.begin(total)
        make = optimizer or (lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.05))
        self.optimizer = make(self.model.parameters())
        self.x, self.y = batch(self.model)
        self.losses = []

    def steps(self, start, stop):
        self.model.train()
        for step in range(start, stop):
            self.controller.on_step(step)
            self.optimizer.zero_grad()
            loss = nn.functional.mse_loss(self.model(self.x), self.y)
            loss.backward()
            self.controller.before_optimizer_step(self.optimizer)
            self.optimizer.step()
            self.controller.after_optimizer_step()
            self.losses.append(loss.item())
        return self

    def state(self):
        """What a checkpoint holds, in its own memory."""
        tensors = {k: v.clone() for k, v in self.model.state_dict().items()}
        return tensors, self.controller.state_dict(), _copy(self.optimizer.state_dict())

    def load(self, state):
        tensors, controller, optimizer = state
        self.model.load_state_dict(tensors)
        self.controller.load_state_dict(controller)
        self.optimizer.load_state_dict(_copy(optimizer))
        return self

    def evaluate(self):
        self.controller.on_eval()
        with torch.no_grad():
            return self.model.eval()(self.x)


def _copy(x):
    if isinstance(x, dict):
        return {k: _copy(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_copy(v) for v in x]
    return x.clone() if isinstance(x, torch.Tensor) else x


def weights_lie_on_their_grid(model):
    """Evaluation computes with what an export writes."""
    for layer in model:
        if hasattr(layer, "weight_quant"):
            layer.weight_quant.eval()
            assert torch.equal(layer.weight_quant(layer.weight), layer.weight_quant.on_grid(layer.weight))


def check_run(make, total=40, drop=0.7):
    """Losses fall and are finite, a run resumed half-way is the same run, and evaluation is on the grid."""
    whole = make().steps(0, total)
    assert all(map(torch.isfinite, map(torch.tensor, whole.losses)))
    assert whole.losses[-1] < drop * whole.losses[0], (whole.losses[0], whole.losses[-1])
    half = make().steps(0, total // 2)
    resumed = make().load(half.state()).steps(total // 2, total)
    assert resumed.losses == whole.losses[total // 2 :]
    for a, b in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    weights_lie_on_their_grid(whole.model)
    return whole


def check_folded(run, path):
    """The folded export, loaded into the float model, computes what evaluation did."""
    want = run.evaluate()
    export(run.model, path, format="folded")
    model = mlp() if isinstance(run.model[0], nn.Linear) else convolutional()
    model.load_state_dict({k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(run.x), want, rtol=1e-5, atol=1e-6)
