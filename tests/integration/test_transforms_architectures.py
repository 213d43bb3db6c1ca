"""Every transform on every architecture: the float function stays within 1e-5, or the site is refused with a reason."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_quant import QuantConfig
from lightning_quant.errors import AttachError
from lightning_quant.transforms import TRANSFORMS, TransformReport, ocs
from tests.integration.processes import differing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
from architectures import FAMILIES, GROUPED, Family

SAME, OUTLIER = 1e-5, 50.0
RESNET = {"hidden_sizes": [16, 32], "depths": [2, 1], "embedding_size": 8, "layer_type": "basic", "num_labels": 4}
MOBILE = {"image_size": 16, "depth_multiplier": 0.25, "hidden_act": "relu", "num_labels": 4}
NINE = {
    **{name: FAMILIES[name] for name in ("llama", "qwen2", "opt", "gpt2", "bert", "vit")},
    "gemma": Family("Gemma", hf.GemmaForCausalLM, hf.GemmaConfig, {**GROUPED, "head_dim": 16}),
    "resnet": Family("ResNet", hf.ResNetForImageClassification, hf.ResNetConfig, RESNET, "images"),
    "mobilenet": Family("MobileNetV2", hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config, MOBILE, "images"),
}
CONVOLUTIONS = ("resnet", "mobilenet")
# Sites of SmoothQuant and of equalization, and whether the residual stream turns; None: float32's rounding decides.
SITES = {
    "llama": (9, 4, True),
    "qwen2": (9, 4, None),
    "gemma": (8, 4, False),
    "opt": (8, 4, False),
    "gpt2": (4, 0, False),
    "bert": (2, 2, False),
    "vit": (7, 2, False),
    "resnet": (3, 3, False),
    "mobilenet": (35, 35, False),
}
# Those that leave the function as it is; the others approximate, and say by how much.
EXACT: dict[str, Callable[..., TransformReport]] = {
    **{name: TRANSFORMS[name] for name in ("smoothquant", "rotate", "equalize")},
    "smoothquant search": partial(TRANSFORMS["smoothquant"], alpha="search"),
    "spinquant": partial(TRANSFORMS["spinquant"], steps=2),
    "awq": partial(TRANSFORMS["awq"], points=4),
}
SEARCHED = ("llama", "gemma", "opt", "resnet")  # the longest, and alike otherwise
APPROXIMATE = ("absorb_bias", "clip_weights", "correct_weights", "correct_bias", "reestimate_bn")
WITH_CONFIG = ("awq", "smoothquant search", "spinquant", "clip_weights", "correct_weights", "correct_bias")


def outlying(family: str) -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    """A model whose normalizations all make every seventh channel 50 times too large, batches, their paths."""
    model, batches = NINE[family].build(), [NINE[family].inputs(seed=i) for i in range(2)]
    planted = []
    with torch.no_grad():
        for path, module in model.named_modules():
            name, weight = type(module).__name__, getattr(module, "weight", None)
            if "Norm" not in name or weight is None:
                continue
            planted.append(path)
            one = 1.0 if name.startswith("Gemma") else 0.0  # it multiplies with 1 + w
            weight += 0.2 * torch.randn(weight.shape)
            weight[::7] = (weight[::7] + one) * OUTLIER - one
            if getattr(module, "bias", None) is not None:
                module.bias += 0.2 * torch.randn(weight.shape)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
    assert planted
    return model.eval(), batches, planted


@torch.no_grad()
def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def moved(model: nn.Module, batch: dict[str, Tensor], start: Tensor) -> float:
    return float((output(model, batch) - start).abs().max() / start.abs().max())


def run(name: str, family: str, model: nn.Module, batches: list[Any]) -> TransformReport:
    scheme = "w4a8-channel-static" if family in CONVOLUTIONS else "w4a8-channel"
    config = {"config": QuantConfig.parse("ste", scheme)} if name in WITH_CONFIG else {}
    return (EXACT.get(name) or TRANSFORMS[name])(model, batches, **config)


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in EXACT for f in NINE if n != "smoothquant search" or f in SEARCHED]
)
def test_the_float_function_stays_or_the_site_is_refused(name, family):
    model, batches, planted = outlying(family)
    before = copy.deepcopy(model.state_dict())
    start = [output(model, b) for b in batches]
    report = run(name, family, model, batches)
    changed = {k.rpartition(".")[0] for k in differing(before, model.state_dict())}
    for batch, want in zip(batches, start, strict=True):
        assert moved(model, batch, want) < SAME
    assert report.difference < SAME
    assert all(why for why in report.refused.values())
    assert bool(changed) == bool(report.applied)
    if name in ("rotate", "spinquant"):
        turned = any("stream" in a.producer for a in report.applied)
        assert SITES[family][2] in (turned, None)
        assert turned or f"{name}: expected" in report.refused[type(model).__name__]
        return
    touched = {a.producer for a in report.applied}
    assert changed <= touched | {c for a in report.applied for c in a.consumers} | set(planted)
    for path in planted:
        assert (path in touched) != (path in report.refused), path
    sites = {"smoothquant": SITES[family][0], "equalize": SITES[family][1]}
    assert len(report.applied) == sites.get(name, len(report.applied))


@pytest.mark.parametrize("family", NINE)
@pytest.mark.parametrize("name", APPROXIMATE)
def test_what_approximates_says_by_how_much(name, family):
    model, batches, _ = outlying(family)
    before, start = copy.deepcopy(model.state_dict()), output(model, batches[0])
    report = run(name, family, model, batches)
    changed = differing(before, model.state_dict())
    assert bool(changed) == bool(report.applied)
    assert report.applied or report.refused
    assert all(why for why in report.refused.values())
    total = moved(model, batches[0], start)
    if name == "absorb_bias":  # site by site
        assert total <= sum(a.difference for a in report.applied) * (1 + 1e-3) + 1e-7
    else:
        assert total == pytest.approx(report.difference, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("family", NINE)
def test_splitting_channels_refuses_models_whose_config_says_their_shapes(family):
    model, batches, _ = outlying(family)
    with pytest.raises(AttachError, match=r"ocs: expected a model whose layers may change shape, got .*(For|LMHead)"):
        ocs(model, batches, QuantConfig.parse("ste", "w4a16-channel"))
