"""Layers are measured one by one, and the recipes that come of it train in both front ends, export and verify."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    default_data_collator,
)

from hf_integration import QuantArguments, QuantTrainer
from lightning_quant import LayerRule, QuantCallback, QuantConfig, attach, calibrate, detach
from lightning_quant.attach import is_attached, quant_layers, quantizers
from lightning_quant.cli import main
from lightning_quant.export import export, verify
from lightning_quant.packed import pack
from lightning_quant.sensitivity import sensitivity
from tests.convnets import ResNet20
from tests.integration.modules import QUIET, trainer
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm, token_batch, token_rows

pytestmark = QUIET
SCHEMES = ("w2a16-g32", "w4a16-g32", "w8a16-g32")


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{**token_batch(seed=i), "labels": token_batch(seed=i)["input_ids"]} for i in range(count)]


@pytest.fixture(scope="module")
def measured():
    model = causal_lm()
    return model, sensitivity(model, batches(), SCHEMES, config=QuantConfig("ste"))


# Measures


def test_a_figure_is_that_of_the_model_with_one_layer_quantized(measured):
    _, found = measured
    group = ("model.layers.1.mlp.down_proj",)
    rules = [LayerRule(group[0]), LayerRule("*", weight=None)]
    reference = causal_lm()
    own = [reference(**b).logits for b in batches()]
    attach(reference.eval(), QuantConfig.parse("ste", "w2a16-g32", rules=rules))
    pairs = zip(batches(), own, strict=True)
    kl = [
        torch.distributions.kl_divergence(
            *(torch.distributions.Categorical(logits=x) for x in (y, reference(**b).logits))
        )
        for b, y in pairs
    ]
    want = torch.stack([k.mean() for k in kl]).mean()
    assert found.losses[found.groups.index(group)][0] == pytest.approx(float(want.detach()), rel=1e-4)


def test_the_model_is_left_as_it_was(measured):
    model, _ = measured
    assert not is_attached(model)
    assert torch.equal(model(**token_batch()).logits, causal_lm()(**token_batch()).logits)


@pytest.mark.parametrize("measure", ["kl", "sqnr", "hessian"])
def test_fewer_bits_lose_more_and_fused_layers_go_together(measure):
    model = causal_lm()
    found = sensitivity(model, batches(), SCHEMES, measure, probes=2)
    assert tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv") in found.groups
    assert all(row[0] > row[1] > row[2] > 0 for row in found.losses)
    weights = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n
    )
    assert sum(found.numbers) == weights
    assert [b / n for b, n in zip(found.bits[0], [found.numbers[0]] * 3, strict=True)] == [2.5, 4.5, 8.5]
    assert "down_proj" in str(found)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["schemes"] == list(SCHEMES)
    assert plain["losses"] == found.losses


def test_the_rise_of_the_loss():
    found = sensitivity(causal_lm(), batches(1), ("w2a16-g32",), "loss")
    assert found.baseline == pytest.approx(float(causal_lm()(**batches(1)[0]).loss.detach()), rel=1e-5)
    one = causal_lm().eval()
    attach(one, QuantConfig.parse("ste", "w2a16-g32", rules=[LayerRule("*.1.mlp.down_proj"), LayerRule("*", None)]))
    rise = float(one(**batches(1)[0]).loss.detach()) - found.baseline
    assert found.losses[found.groups.index(("model.layers.1.mlp.down_proj",))][0] == pytest.approx(rise, abs=1e-6)


def test_signal_to_noise_by_hand():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)), torch.randn(64, 32)
    schemes = ("w2a8-channel-static", "w8a8-static", "w4a16-g32")
    found = sensitivity(net, [x[:32], x[32:]], schemes, "sqnr")
    assert found.groups == [("0",), ("2",)]
    assert all(row[0] > row[2] > row[1] for row in found.losses)
    y, h = net(x), torch.tanh(net[0](x))
    attach(net.eval(), QuantConfig.parse("ste", schemes[0]))
    calibrate(net, [x[:32], x[32:]])
    last = net[2]
    pairs = {"weight": (last.weight, last.on_grid()), "input": (h, last.input_quant(h)), "output": (y, last(h))}
    for name, (clean, noisy) in pairs.items():
        ratio = float(((noisy - clean).square().sum() / clean.square().sum()).detach())
        assert found.details["2"][name][0] == pytest.approx(-10 * math.log10(ratio), rel=1e-4), name
        if name == "output":
            assert found.losses[1][0] == pytest.approx(ratio, rel=1e-4)
    assert found.details["2"]["input"][2] == math.inf  # in float
    assert found.to_dict()["details"]["2"]["input"][2] is None
    assert "signal to noise" in str(found)


def test_a_convolution_network_with_a_loss_of_ones_own():
    torch.manual_seed(0)
    net = ResNet20(4, 1).train()
    data = [(torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))) for _ in range(2)]
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    for measure in ("loss", "sqnr", "hessian"):
        found = sensitivity(net, data, ("w2a4-static", "w8a8-static"), measure, loss=loss, probes=2)
        assert {path for group in found.groups for path in group} == {
            p for p, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
        }
        if measure != "loss":
            assert all(row[0] > 3 * row[1] > 0 for row in found.losses)
    assert found.bops[0][1] == 8 * 8 * 4 * 9 * 64  # per image: the stem's places, channels, kernel, 8 x 8 bits
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# Recipes


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_a_recipe_keeps_its_budget_trains_and_exports(measured, tmp_path, solver):
    _, found = measured
    recipe = found.recipe(4.0, solver)
    assert recipe.costs["bits"] <= 4.0
    assert (recipe.gap is None) == (solver == "greedy")
    config = recipe.config(QuantConfig("lsq"))
    model = train_a_little(causal_lm(), QuantConfig.from_dict(config.to_dict()))
    widths = {p: layer.weight_quant.spec.bits for p, layer in quant_layers(model)}
    assert widths == {p: int(scheme[1]) for p, scheme in recipe.schemes.items()}
    assert len(set(widths.values())) > 1
    assert widths["model.layers.0.self_attn.q_proj"] == widths["model.layers.0.self_attn.k_proj"]
    export(model, tmp_path / "out", target="vllm", config=config)
    assert verify(tmp_path / "out", model).ok


def test_the_greedy_gap_is_stated(measured):
    _, found = measured
    gaps = []
    for bits in (2.7, 3.1, 3.9, 4.6, 5.3, 6.6, 7.7):
        exact, greedy = found.recipe(bits), found.recipe(bits, "greedy")
        assert exact.gap >= 0
        assert greedy.loss == pytest.approx(exact.loss * (1 + exact.gap))
        assert f"chosen greedily it would be {exact.gap:.2%} more" in str(exact)
        assert "greedily" not in str(greedy)
        gaps.append(exact.gap)
    assert max(gaps) > 0


def test_mixed_widths_lose_less_than_one_width_of_as_many_bits(measured):
    model, found = measured
    mixed, data, losses = found.recipe(4.5).config(QuantConfig("ste")), batches(), {}
    for name, config in (("one", QuantConfig.parse("ste", "w4a16-g32")), ("mixed", mixed)):
        attach(model, config)
        with torch.no_grad():
            logits = [model(**b).logits for b in data]
            for _, q in quantizers(model):
                q.enabled = False
            losses[name] = sum(
                float((x - model(**b).logits).square().mean()) for x, b in zip(logits, data, strict=True)
            )
        detach(model, fold=False)
    assert losses["mixed"] <= losses["one"] * 1.02


def test_a_size_is_that_of_the_file(tmp_path):
    """compressed-tensors holds what was predicted, and two integers of shape for each packed weight."""
    model = causal_lm().bfloat16()
    found = sensitivity(model, batches(1), ("w4a16-g32", "w8a16"), "sqnr")
    recipe = found.recipe("96KiB")
    assert recipe.costs["bytes"] <= 96 * 1024
    assert len(set(recipe.schemes.values())) == 2
    config = recipe.config(QuantConfig("ste"))
    attach(model, config)
    export(model, tmp_path / "out", config=config)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    shapes = sum(t.numel() * 8 for name, t in stored.items() if name.endswith("weight_shape"))
    assert sum(t.numel() * t.element_size() for t in stored.values()) - shapes == recipe.costs["bytes"]


# The command


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A directory of a model with its tokenizer."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from causal_lm import read_text, train_tokenizer

    root = tmp_path_factory.mktemp("language")
    tokenizer = train_tokenizer(read_text(None)[:50_000], 300)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def recipe(language, tmp_path_factory):
    """What the command wrote for it."""
    root = tmp_path_factory.mktemp("recipe")
    words = ["sensitivity", str(language), "--samples", "2", "--length", "16", "--method", "lsq"]
    words += ["--schemes", "w2a16-g32,w4a16-g32,w8a16", "--budget", "4.5bits", "--out", str(root / "recipe.yaml")]
    words += ["--json", str(root / "figures.json"), "--plot", str(root / "plot.png")]
    assert main(words) == 0
    return root


def widths_of(model: nn.Module) -> dict[str, tuple[float, float | None]]:
    return {
        p: (m.weight_quant.spec.bits, None if m.input_quant is None else m.input_quant.spec.bits)
        for p, m in quant_layers(model)
    }


def test_the_command(language, recipe, capsys, tmp_path):
    figures = json.loads((recipe / "figures.json").read_text())
    assert figures["measure"] == "kl"
    assert figures["rest"]["bops"] == 16 * 64 * 300 * 256  # the head, on 16 tokens
    assert (recipe / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in recipe.iterdir()) == ["figures.json", "plot.png", "recipe.yaml"]
    table = tmp_path / "seconds.json"
    table.write_text(
        json.dumps({"*.mlp.*": {"w4a16-g32": 1e-3, "w8a16": 2e-3}, "*": {"w4a16-g32": 1e-4, "w8a16": 1e-4}})
    )
    words = ["sensitivity", str(language), "--samples", "2", "--length", "16", "--schemes", "w4a16-g32,w8a16"]
    for more in (
        ["--measure", "hessian", "--probes", "2", "--budget", "220KiB"],
        ["--measure", "sqnr", "--budget", "430MBOPs", "--solver", "greedy"],
        ["--measure", "loss", "--budget", "9ms", "--latency", str(table)],
        ["--measure", "mse", "--budget", "1s", "--latency", "measure", "--rows", "1"],
    ):
        assert main([*words, *more]) == 0
        printed = capsys.readouterr().out
        assert "model.layers.0.mlp.up_proj" in printed
        assert "bits per weight" in printed


def test_what_the_command_refuses(language, capsys, tmp_path):
    (tmp_path / "words.safetensors").write_text("no tensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "uneven.safetensors")
    QuantConfig("lsq").to_yaml(tmp_path / "base.yaml")
    words = ["sensitivity", str(language), "--samples", "1", "--length", "8"]
    for more, message in (
        (["--out", "x.yaml"], "expected --budget as well, got none"),
        (["--budget", "3ms"], "--budget 3ms: expected --latency as well"),
        (["--budget", "3parsecs"], "expected a number and a unit"),
        (["--budget", "1KiB", "--schemes", "w4a16-g32"], "of it in what is not chosen for) or more, got 1 KiB"),
        (["--solver", "lucky", "--budget", "8bits"], "solver: expected one of exact, greedy, got 'lucky'"),
        (["--measure", "taste"], "measure: expected one of"),
        (["--config", str(tmp_path / "base.yaml"), "--method", "lsq"], "expected --config, or --method and --target"),
        (["--data", str(tmp_path / "words.safetensors")], "expected a safetensors file"),
        (["--data", str(tmp_path / "uneven.safetensors")], "tensors with as many rows as there are samples"),
    ):
        assert main([*words, *more]) == 2, more
        assert message in capsys.readouterr().err.replace("sensitivity: expected one of", "measure: expected one of")
    assert main(["sensitivity", str(tmp_path)]) == 2
    assert "expected a model of transformers" in capsys.readouterr().err


def test_bad_input():
    net, stored = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
    pack(stored, "w4-g32")
    x = [torch.randn(2, 32)]
    with pytest.raises(ValueError, match=r"sensitivity: expected one of .*, got 'taste'"):
        sensitivity(net, x, measure="taste")
    with pytest.raises(ValueError, match="a batch and a scheme at least, got 0 batches"):
        sensitivity(net, [])
    with pytest.raises(ValueError, match="a model that returns its loss, got NoneType"):
        sensitivity(causal_lm(), [token_batch()], ("w4a16-g32",), measure="loss")
    with pytest.raises(ValueError, match=r"a model that returns its loss, got a tensor of shape \(2, 32\)"):
        sensitivity(net, x, ("w4a16-g32",), measure="hessian")
    with pytest.raises(ValueError, match=r"measure 'kl': expected the model's outputs, got loss="):
        sensitivity(net, x, loss=lambda model, batch: model(batch).sum())
    with pytest.raises(ValueError, match=r"schemes with weights below 16 bits, got 'w16a16'"):
        sensitivity(net, x, ("w4a16-g32", "w16a16"))
    with pytest.raises(ValueError, match=r"^0: expected a weight in float, got one that is stored in a few bits"):
        sensitivity(stored, x, ("w4a16-g32",))
    with pytest.raises(ValueError, match=r"budget: expected 4\.5 bits per weight or more, got 3 bits per weight"):
        sensitivity(net, x, ("w4a16-g32",), "mse").recipe(3.0)


# Both front ends


class Writer(L.LightningModule):
    """Somebody's module around a language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("front_end", ["lightning", "lightning-part", "hf"])
def test_a_recipe_trains_a_language_model_in_both_front_ends(language, recipe, tmp_path, front_end):
    model = AutoModelForCausalLM.from_pretrained(language).train()
    rows = Dataset.from_list(token_rows(16))
    path = recipe / "recipe.yaml"
    if front_end == "hf":
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        quant = QuantArguments(quant_config=str(path)).to_config()
        run = QuantTrainer(model, arguments, default_data_collator, rows, quant=quant)
        run.train()
        run.export(tmp_path / "out")
    else:  # the same file for the whole module, whose paths begin with one name more, and for the part of it
        quant = QuantCallback(config=QuantConfig.from_yaml(path), module="model" if "part" in front_end else None)
        module = Writer(model)
        loader = DataLoader(rows.with_format("torch"), batch_size=4)
        trainer(tmp_path, quant, max_epochs=1).fit(module, loader)
        export(model, tmp_path / "out", config=quant.config)
    widths = {p: w for p, (w, _) in widths_of(model).items()}
    assert len(widths) == 14
    assert len(set(widths.values())) > 1
    data = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {g["weights"]["num_bits"] for g in data["config_groups"].values()} == set(widths.values())
    report = verify(tmp_path / "out", model)
    assert (report.ok, report.max_abs_diff) == (True, 0.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A residual network of transformers, its data, and the recipe of widths that the command wrote."""
    root = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    settings = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=4, **settings)).save_pretrained(root / "model")
    y = torch.arange(64) % 4
    x = torch.randn(64, 1, 16, 16) * 0.3 + y.view(-1, 1, 1, 1)
    save_file({"pixel_values": x, "labels": y}, root / "data.safetensors")
    QuantConfig.parse("lsq", "w8a8-static", operators=8, target="onnxruntime", calibration=2).to_yaml(
        root / "base.yaml"
    )
    words = ["sensitivity", str(root / "model"), "--data", str(root / "data.safetensors"), "--measure", "hessian"]
    words += ["--schemes", "w4a4-static,w4a8-static,w8a8-static", "--config", str(root / "base.yaml"), "--probes", "4"]
    assert main([*words, "--budget", "3.3MBOPs", "--out", str(root / "r.yaml"), "--plot", str(root / "p.png")]) == 0
    return root


class Painter(Writer):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss


@pytest.mark.parametrize("front_end", ["lightning", "hf"])
def test_a_recipe_trains_a_convolution_network_in_both_front_ends(pictures, tmp_path, front_end):
    model = ResNetForImageClassification.from_pretrained(pictures / "model").train()
    data = load_file(pictures / "data.safetensors")
    rows = Dataset.from_dict({k: v.tolist() for k, v in data.items()}).with_format("torch")
    config = QuantConfig.from_yaml(pictures / "r.yaml")
    if front_end == "hf":
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        QuantTrainer(model, arguments, default_data_collator, rows, quant=config).train()
    else:
        trainer(tmp_path, QuantCallback(config=config), max_epochs=1).fit(
            Painter(model), DataLoader(rows, batch_size=16)
        )
    model.eval()
    widths = widths_of(model)
    assert len(widths) == 9
    assert len(set(widths.values())) > 1
    stage = "resnet.encoder.stages"
    same = [
        ("resnet.embedder.embedder.convolution", f"{stage}.0.layers.0.layer.1.convolution"),
        (f"{stage}.0.layers.0.layer.1.convolution", f"{stage}.0.layers.1.layer.1.convolution"),
        (f"{stage}.1.layers.0.shortcut.convolution", f"{stage}.1.layers.0.layer.0.convolution"),
        (f"{stage}.1.layers.0.shortcut.convolution", f"{stage}.1.layers.0.layer.1.convolution"),
    ]
    assert all(widths[a][1] == widths[b][1] for a, b in same)
    inputs = {"pixel_values": data["pixel_values"][:4]}
    export(model, tmp_path / "out", format="onnx", config=config, inputs=inputs)
    report = verify(tmp_path / "out", model, inputs=inputs)
    assert (report.ok, report.max_abs_diff) == (True, 0.0)
