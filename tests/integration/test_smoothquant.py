"""SmoothQuant site by site against the formula in float64, its defaults, and its search against a plain loop."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.attach import quantizers
from lightning_quant.transforms import smoothquant
from tests.integration.processes import differing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
from architectures import FAMILIES, GROUPED, Family

GEMMA = Family("Gemma", hf.GemmaForCausalLM, hf.GemmaConfig, {**GROUPED, "head_dim": 16})
LLAMA_BLOCK = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}
OPT_BLOCK = {
    "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.out_proj",),
    "final_layer_norm": ("fc1",),
    "fc1": ("fc2",),
}


@dataclass(frozen=True)
class Kind:
    """A family, a block of it, and which of its layers read which."""

    family: Family
    block: str
    sites: dict[str, tuple[str, ...]]
    repeats: int = 1  # heads of queries that share one of values


KINDS = {
    "RMS norm, grouped-query attention": Kind(FAMILIES["llama"], "model.layers.1", LLAMA_BLOCK, 2),
    "a norm of 1 + w": Kind(GEMMA, "model.layers.1", LLAMA_BLOCK, 2),
    "a norm with a bias": Kind(FAMILIES["opt"], "model.decoder.layers.1", OPT_BLOCK),
}


def prepared(family: Family) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    model = family.build().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    return model, [family.inputs(rows=3, seed=i) for i in range(2)]


@torch.no_grad()
def largest_inputs(model: nn.Module, batches: list[Any], paths: list[str]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            now = args[0].abs().flatten(0, -2).amax(0).double().numpy()
            found[path] = np.maximum(found.get(path, 0.0), now)

        return hook

    handles = [model.get_submodule(p).register_forward_pre_hook(keep(p)) for p in paths]
    for b in batches:
        model(**b)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_every_kind_of_site_gets_the_factors_of_the_formula(name, alpha):
    kind = KINDS[name]
    model, batches = prepared(kind.family)
    readers = [r for rs in kind.sites.values() for r in rs]
    top = largest_inputs(model, batches, [f"{kind.block}.{r}" for r in readers])
    old = copy.deepcopy(model).double()
    report = smoothquant(model, batches, alpha)
    assert {f"{kind.block}.{p}" for p in kind.sites} <= {a.producer for a in report.applied}
    block, was = model.get_submodule(kind.block), old.get_submodule(kind.block)
    factors, index = {}, {}
    for producer, consumers in kind.sites.items():
        width = len(was.get_submodule(producer).weight)
        index[producer] = np.arange(width)
        if producer.endswith("v_proj") and kind.repeats > 1:  # each head of values is read by so many of queries
            index[producer] = np.repeat(np.arange(width).reshape(-1, 16), kind.repeats, axis=0).reshape(-1)
        x, w = np.zeros(width), np.zeros(width)
        for c in consumers:
            np.maximum.at(x, index[producer], top[f"{kind.block}.{c}"])
            np.maximum.at(w, index[producer], was.get_submodule(c).weight.detach().abs().amax(0).numpy())
        factors[producer] = np.maximum(x, 1e-5) ** alpha / np.maximum(w, 1e-5) ** (1 - alpha)
    for producer, consumers in kind.sites.items():
        for c in consumers:
            want = was.get_submodule(c).weight.detach().numpy() * factors[producer][index[producer]]
            if c in factors:  # it makes what another reads
                want = want / factors[c][:, None]
            np.testing.assert_allclose(block.get_submodule(c).weight.detach(), want, rtol=1e-4, atol=1e-7)
        made, before = block.get_submodule(producer), was.get_submodule(producer)
        weight = before.weight.detach().numpy()
        if weight.ndim == 1:
            one = 1.0 if name == "a norm of 1 + w" else 0.0
            want = (weight + one) / factors[producer] - one
            np.testing.assert_allclose(made.weight.detach(), want, rtol=1e-4, atol=1e-6)
        if getattr(made, "bias", None) is not None:
            want = before.bias.detach().numpy() / factors[producer]
            np.testing.assert_allclose(made.bias.detach(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "alpha"), [("llama", 0.85), ("mistral", 0.8), ("opt", 0.5), ("vit", 0.5)])
def test_models_have_the_alpha_of_the_authors(family, alpha):
    found = []
    for given in (None, alpha, 0.33):
        model, batches = prepared(FAMILIES[family])
        smoothquant(model, batches, given)
        found.append(model.state_dict())
    assert differing(found[0], found[1]) == []
    assert differing(found[0], found[2])


def test_the_search_takes_what_a_plain_loop_finds():
    """The block's error with quantized gates, for alpha = 0, 0.05, ..., 1 or none; other sites do not matter to it."""
    model, batches = prepared(FAMILIES["llama"])
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[::9] *= 20
    config = QuantConfig.parse("ste", "w4a4-channel")
    path, readers = "model.layers.1", ("mlp.gate_proj", "mlp.up_proj")
    top = largest_inputs(model, batches, [f"{path}.{r}" for r in readers])
    x = torch.tensor(np.maximum(*[top[f"{path}.{r}"] for r in readers])).float()
    layers = [model.get_submodule(f"{path}.{r}") for r in readers]
    w = torch.stack([layer.weight.detach().abs().amax(0) for layer in layers]).amax(0)
    trials = [torch.ones(64), *(x ** (a / 20) / w ** (1 - a / 20) for a in range(21))]

    @torch.no_grad()
    def output(net: nn.Module) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        block = net.get_submodule(path)
        handle = block.register_forward_hook(lambda m, a, y: kept.append(y[0] if isinstance(y, tuple) else y))
        net(**batches[0])
        handle.remove()
        return kept[0].double()

    want, errors = output(model), []
    for s in trials:
        net = copy.deepcopy(model)
        block = net.get_submodule(path)
        with torch.no_grad():
            block.post_attention_layernorm.weight /= s
            for r in readers:
                block.get_submodule(r).weight *= s
        attach(net, config)
        for name, q in quantizers(net):
            q.enabled = any(name.startswith(f"{path}.{r}") for r in readers)
        errors.append(float((output(net) - want).square().mean()))
    best = min(range(len(trials)), key=errors.__getitem__)
    assert errors[best] < 0.9 * errors[0]
    assert best not in (0, 11)  # neither nothing nor a half: the search has something to find
    start = model.model.layers[1].post_attention_layernorm.weight.detach().clone()
    report = smoothquant(model, batches, "search", config)
    assert f"{path}.post_attention_layernorm" in {a.producer for a in report.applied}
    factor = start / model.model.layers[1].post_attention_layernorm.weight.detach()
    torch.testing.assert_close(factor, trials[best], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best"])
def test_bad_alphas(alpha):
    model, batches = prepared(FAMILIES["llama"])
    with pytest.raises(ValueError, match=r"smoothquant.alpha: expected a number in \[0, 1\] or 'search'"):
        smoothquant(model, batches, alpha)
    with pytest.raises(ValueError, match="expected a config, whose grids are tried"):
        smoothquant(model, batches, "search")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_worked_on_in_float32(dtype):
    """Sites are those of the model in float32, the proof is that of float32, and dtypes come back."""
    model, batches = prepared(FAMILIES["llama"])
    model = model.to(dtype)
    wide, held = copy.deepcopy(model).float(), {n: id(p) for n, p in model.named_parameters()}
    reports = [smoothquant(m, batches) for m in (wide, model)]
    assert [a.producer for a in reports[0].applied] == [a.producer for a in reports[1].applied]
    assert len(reports[1].applied) == 9
    assert reports[1].difference < 1e-5
    assert {n: id(p) for n, p in model.named_parameters()} == held
    for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert p.dtype == dtype, name
        assert torch.equal(p, q.to(dtype)), name
