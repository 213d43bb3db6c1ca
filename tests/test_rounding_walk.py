"""Forwards that stop at blocks compute what they would have computed, and tell where they stand."""

import threading

import pytest
import torch
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.rounding import round_model
from lightning_quant.rounding.blockwise import units
from lightning_quant.rounding.walk import Walk


class Net(nn.Module):
    """Blocks with glue: a mask, a residual connection outside, one block that is run twice, one way of two."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x, short=False):
        x = self.stem(x)
        mask = (x > -1).float()
        first = self.blocks[0](x) * mask
        if not short:
            first = self.blocks[1](first) + x
        y = self.blocks[2](first)
        y = self.blocks[2](y)
        return self.head(y - first)


def batches():
    return [torch.randn(5, 8) for _ in range(3)]


@torch.no_grad()
def test_a_walk_computes_what_the_forwards_do():
    model, xs = Net(), batches()
    seen, outputs = [], []
    hook = model.head.register_forward_hook(lambda m, a, y: outputs.append(y))
    want = [model(x) for x in xs]
    outputs.clear()
    with Walk(model, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"], xs) as walk:
        place = walk.advance()
        while place is not None:
            path, calls = place
            seen.append(path)
            place = walk.advance([call.run(model.get_submodule(path)) for call in calls])
    hook.remove()
    assert seen == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))
    assert "forward" not in model.blocks[0].__dict__


def test_threads_end_with_the_walk():
    before, model = threading.active_count(), Net()
    with Walk(model, ["blocks.0"], batches()) as walk:
        walk.advance()
        assert threading.active_count() == before + 3
    assert threading.active_count() == before
    assert "forward" not in model.blocks[0].__dict__


def test_an_error_in_a_forward_is_raised_here():
    with Walk(Net(), ["blocks.0"], [torch.randn(5, 7)]) as walk, pytest.raises(RuntimeError, match="shapes"):
        walk.advance()


def test_batches_that_take_different_ways_are_refused():
    config = QuantConfig.parse("ste", "w4a16-channel")
    two = [{"x": torch.randn(5, 8)}, {"x": torch.randn(5, 8), "short": True}]
    with pytest.raises(ValueError, match=r"reach the same block next, got blocks\.1 and blocks\.2"):
        round_model(Net(), config, two, "gptq")


@pytest.mark.parametrize("rounding", ["gptq", "adaround", "brecq"])
def test_every_layer_is_rounded_wherever_it_stands(rounding):
    model = Net()
    attach(model, QuantConfig.parse("ste", "w3a16-channel"))
    options = {} if rounding == "gptq" else {"iterations": 60, "lr": 0.05}
    report = round_model(model, None, batches(), rounding, **options)
    assert units(model) == [f"blocks.{i}" for i in range(4)]
    assert set(report.errors) == {"stem", "blocks.0.0", "blocks.1.0", "blocks.2.0", "head"}
    assert report.nearest == {"blocks.3.0": "no calibration input reached it"}
    for layer in (model.stem, model.blocks[3][0], model.head):
        assert torch.equal(layer.weight, layer.on_grid())


def test_layers_see_what_the_rounded_ones_before_them_make():
    """The head's moments are those of the model whose blocks are rounded."""
    model, xs = Net(), batches()
    seen = []
    attach(model, QuantConfig.parse("ste", "w2a16-channel"))

    def note(module, args):
        if threading.current_thread() is not threading.main_thread():
            seen.append(args[0].clone())

    hook = model.head.register_forward_pre_hook(note)
    round_model(model, None, xs, "gptq")
    hook.remove()
    last = seen[-3:]
    got = []
    hook = model.head.register_forward_pre_hook(lambda m, a: got.append(a[0].clone()))
    for x in xs:
        model(x)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(last, got, strict=True))
