"""Layers whose inputs must have one width are found by running the model, whatever its modules are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import QuantConfig, attach, detach
from lightning_quant.attach import quant_layers
from lightning_quant.sensitivity import sensitivity
from lightning_quant.sensitivity.traffic import watch
from tests.convnets import ResNet20
from tests.integration.tiny import causal_lm, token_batch

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def ties(model: nn.Module, x: Tensor, **settings: object) -> set[frozenset[str]]:
    attach(model.eval(), QuantConfig.parse("ste", "w4a4-channel", **settings))
    return {frozenset(group) for group in watch(model, lambda: model(x)).tied}


def names(*groups: str) -> set[frozenset[str]]:
    return {frozenset(group.split()) for group in groups}


def test_a_residual_network():
    readers = names("blocks.1.conv1 blocks.1.downsample.0", "blocks.2.conv1 blocks.2.downsample.0")
    assert ties(ResNet20(4, 1), IMAGES) == readers
    sums = names("conv blocks.0.conv2", "blocks.1.conv2 blocks.1.downsample.0", "blocks.2.conv2 blocks.2.downsample.0")
    assert ties(ResNet20(4, 1), IMAGES, operators=8) == readers | sums


def test_a_sum_goes_on_to_the_next():
    """Blocks with plain shortcuts add to one stream, which the layer before them began."""
    found = ties(ResNet20(4, 2), IMAGES, operators=8)
    assert frozenset(["conv", "blocks.0.conv2", "blocks.1.conv2"]) in found
    assert frozenset(["blocks.2.conv2", "blocks.2.downsample.0", "blocks.3.conv2"]) in found
    assert not any("blocks.1.conv1" in group for group in found)


class Branches(nn.Module):
    """Names that say nothing; tensors that are equal but not the same; a rectifier in place."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.x, self.y = (nn.Linear(16, 16) for _ in range(5))
        self.act = nn.ReLU(inplace=True)

    def forward(self, t: Tensor) -> Tensor:
        a = self.q_proj(t)
        b = self.k_proj(t.clone())  # the same numbers, another tensor
        a = self.act(a)
        c = self.v_proj(a) + self.x(a.view(2, 2, 16)).flatten(0, 1)  # the second reads a view
        return torch.cat([self.y(a), b], 1) + torch.cat([c, c], 1) * 2


def test_only_the_same_tensor_ties():
    x = torch.randn(4, 16)
    assert ties(Branches(), x, target="transformers") == names("v_proj x y")
    joined = ties(Branches(), x, target="transformers", operators=8)
    assert joined == names("v_proj x y", "v_proj x", "y k_proj", "y k_proj v_proj x")


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, t: Tensor) -> Tensor:
        t = t.clone()
        y = self.a(t)
        t.mul_(2)  # the same memory, other numbers
        return y + self.b(t) + self.c(t)


def test_a_tensor_that_was_written_to_is_another():
    assert ties(Overwritten(), torch.randn(4, 16)) == names("b c")


def test_recipes_respect_ties():
    torch.manual_seed(0)
    model = ResNet20(4, 1)
    config = QuantConfig.parse("ste", "w8a8-static", operators=8, target="onnxruntime")
    schemes = ("w2a4-static", "w4a4-static", "w4a8-static", "w8a8-static")
    found = sensitivity(model, [IMAGES], schemes, "mse", config)
    place = {path: i for i, (path,) in enumerate(found.groups)}
    tied = [("conv", "blocks.0.conv2")]
    for block in ("blocks.1", "blocks.2"):
        tied += [(f"{block}.conv1", f"{block}.downsample.0"), (f"{block}.conv2", f"{block}.downsample.0")]
    assert {frozenset(tie) for tie in found.ties} == {frozenset(place[p] for p in group) for group in tied}
    parted = 0
    for bits in (2.5, 3, 3.5, 4, 5, 6):
        for solver in ("exact", "greedy"):
            recipe = found.recipe(bits, solver)
            attach(model, recipe.config(config))
            widths = {p: (m.weight_quant.spec.bits, m.input_quant.spec.bits) for p, m in quant_layers(model)}
            detach(model, fold=False)
            assert recipe.schemes == {p: f"w{w}a{a}-static" for p, (w, a) in widths.items()}
            assert all(widths[a][1] == widths[b][1] for a, b in tied), bits
            parted += any(widths[a][0] != widths[b][0] for a, b in tied)
            assert recipe.costs["bits"] <= bits
    assert parted  # weights may differ where inputs do not


@pytest.mark.parametrize(("target", "fused"), [("vllm", True), ("transformers", False)])
def test_a_transformer(target, fused):
    """One scheme for what vLLM makes one layer of; elsewhere they read one input and share its width alone."""
    schemes = ("w2a8-g32", "w4a8-g32", "w4a16-g32", "w8a16")
    found = sensitivity(causal_lm(), [token_batch()], schemes, "kl", QuantConfig("ste", target=target))
    heads = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert (tuple(heads) in found.groups) == fused
    if fused:
        assert found.ties == []
        return
    together = [[found.groups[i][0] for i in tie] for tie in found.ties]
    assert heads in together
    assert len(together) == 4
    mixed = 0
    for bits in (3, 3.5, 4, 5, 6):
        schemes_of = found.recipe(bits).schemes
        for group in together:
            assert len({schemes_of[p].split("-")[0][2:] for p in group}) == 1
            mixed += len({schemes_of[p] for p in group}) > 1
    assert mixed
