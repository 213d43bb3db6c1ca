"""Presets of set-up: which steps they are, and that a model that needs them loses less by quantization with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, LlamaConfig, LlamaForCausalLM

from hf_integration import QuantArguments
from lightning_quant import QuantCallback, QuantConfig, QuantController, TensorSpec, calibrate
from lightning_quant.attach import quantizers
from lightning_quant.presets import PRESETS
from lightning_quant.transforms.setup import check_setup

VOCAB, SIZES = 24, {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
Batch = dict[str, Tensor]


# ---- what they stand for


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("scheme", "place"), [("w4a16-g32", 0), ("w8a8", 1)])
def test_a_preset_is_kept_as_its_steps(name, scheme, place, tmp_path):
    config = QuantConfig.parse("ste", scheme, setup=name)
    assert config.setup == PRESETS[name][place]
    check_setup(config)
    config.to_yaml(tmp_path / "c.yaml")
    assert name not in (tmp_path / "c.yaml").read_text()
    assert QuantConfig.from_yaml(tmp_path / "c.yaml") == config
    assert QuantCallback("ste", scheme, setup=name).config.setup == config.setup
    words = ["--quant", "ste", "--quant_scheme", scheme, "--quant_setup", name]
    (flags,) = HfArgumentParser(QuantArguments).parse_args_into_dataclasses(words)
    assert flags.to_config().setup == config.setup
    resumed = QuantController(QuantConfig.parse("ste", scheme, setup=name))
    resumed.load_state_dict(QuantController(config).state_dict())


def test_presets_stand_beside_other_steps_and_in_recipes():
    steps = QuantConfig.from_dict({"version": 1, "setup": ["light", "gptq"], "activation": None}).setup
    assert steps == ("awq", "correct_bias", "gptq")
    assert QuantConfig("ste", TensorSpec(8), TensorSpec(8), setup="data_free").setup[2] == "absorb_bias"
    with pytest.raises(ValueError, match="gptq: expected one rounding at most, got it after adaround"):
        QuantCallback("ste", "w8a8", setup=["advanced", "gptq"])
    with pytest.raises(ValueError, match="adaround: expected training that is quantized from its first step"):
        QuantCallback("ste", "w8a8", setup="advanced", delay=10)


# ---- what they do


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, lr: float) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    return model.eval()


def chains(rows: int, seed: int) -> Batch:
    """Each token follows from the two before it, most of the time."""
    table = torch.randint(0, VOCAB - 4, (VOCAB - 4, VOCAB - 4), generator=torch.Generator().manual_seed(9))
    draw = torch.Generator().manual_seed(seed)
    out = torch.randint(0, VOCAB - 4, (rows, 24), generator=draw)
    for t in range(2, 24):
        follows = torch.rand(rows, generator=draw) < 0.95
        out[:, t] = torch.where(follows, table[out[:, t - 2], out[:, t - 1]], out[:, t])
    return {"input_ids": out + 4, "labels": out + 4}


def topics(rows: int, seed: int) -> Batch:
    """The label is the column of a third of the tokens."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 8, (rows,), generator=draw)
    x = torch.randint(0, 88, (rows, 16), generator=draw)
    own = torch.rand(x.shape, generator=draw) < 0.3
    return {"input_ids": torch.where(own, x // 8 * 8 + y[:, None], x), "labels": y}


def llama(seed: int) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=32))
    fit(model, lambda step: model(**chains(16, 1000 * seed + step)).loss, 300, 3e-3)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            outlying(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
            outlying(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    return model, [chains(8, 10**6 + i) for i in range(8)]


def bert(seed: int) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(seed)
    rest = {"max_position_embeddings": 32, "initializer_range": 0.1, "num_labels": 8}
    rest |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=96, **rest))
    fit(model, lambda step: model(**topics(32, 1000 * seed + step)).loss, 300, 1e-3)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            outlying(layer.attention.self.value, [layer.attention.output.dense])
    return model, [topics(16, 10**6 + i) for i in range(8)]


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def layer(wide: int, out: int, kernel: int, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(wide, out, kernel, padding=kernel // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(out), nn.ReLU()]

        body = [*layer(1, 16, 3), *layer(16, 16, 3, 16), *layer(16, 32, 1), *layer(32, 32, 3, 32), *layer(32, 32, 1)]
        self.body = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(self.body(x))


def cnn(seed: int) -> tuple[nn.Module, list[Batch]]:
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(seed)
    model = Cnn()
    chosen = [torch.randint(len(x), (64,)) for _ in range(150)]
    fit(model, lambda step: F.cross_entropy(model(x[chosen[step]]), y[chosen[step]]), 150, 5e-3)
    layers = [m for m in model.body if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    with torch.no_grad():
        for norm, reader in zip(layers[1:-1:2], layers[2::2], strict=True):
            outlying(norm, [reader])
    return model, [{"x": x[i : i + 32], "labels": y[i : i + 32]} for i in range(0, 256, 32)]


def outlying(producer: Any, readers: list[Any], channels: int = 3, factor: float = 30.0) -> None:
    """What trained models have: channels far larger than the others; the function stays as it is."""
    producer.weight[:channels] *= factor
    if getattr(producer, "bias", None) is not None:
        producer.bias[:channels] *= factor
    for reader in readers:
        rows = getattr(reader, "groups", 1) > 1
        (reader.weight[:channels] if rows else reader.weight[:, :channels]).div_(factor)


MODELS = {"llama": llama, "bert": bert, "cnn": cnn}


@pytest.fixture(scope="module")
def trained() -> Callable[[str, int], tuple[nn.Module, list[Batch]]]:
    known: dict[tuple[str, int], tuple[nn.Module, list[Batch]]] = {}

    def get(name: str, seed: int) -> tuple[nn.Module, list[Batch]]:
        if (name, seed) not in known:
            known[name, seed] = MODELS[name](seed)
        model, batches = known[name, seed]
        return copy.deepcopy(model), batches

    return get


@torch.no_grad()
def logits(model: nn.Module, batches: list[Batch]) -> Tensor:
    outputs = [model.eval()(**batch) for batch in batches]
    return torch.cat([(y if isinstance(y, Tensor) else y.logits).flatten(0, -2) for y in outputs]).log_softmax(-1)


@torch.no_grad()
def task_loss(model: nn.Module, batches: list[Batch]) -> float:
    outputs = [model.eval()(**batch) for batch in batches]
    pairs = zip(outputs, batches, strict=True)
    found = [float(F.cross_entropy(y, b["labels"]) if isinstance(y, Tensor) else y.loss) for y, b in pairs]
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("name", "scheme", "seed"),
    [
        ("llama", "w4a16-g32", 0),
        ("llama", "w4a16-g32", 1),
        ("llama", "w8a8-static", 0),
        ("bert", "w4a8-g32", 0),
        ("bert", "w4a16-g32", 0),
        ("cnn", "w4a16", 0),
        ("cnn", "w4a16", 1),
        ("cnn", "w8a8-tensor", 0),
    ],
)
def test_the_calibrated_loss_is_no_worse_than_without(trained, name, scheme, seed):
    """Neither the task's loss nor the divergence from the float model's predictions."""
    model, batches = trained(name, seed)
    float_logits, figures = logits(model, batches), {}
    for preset in (None, *PRESETS):
        model, _ = trained(name, seed)
        config = QuantConfig.parse("ste", scheme, **({"setup": preset} if preset else {}))
        report = QuantController(config).prepare(model, batches=lambda: batches)
        if not all(q.ready for _, q in quantizers(model)):
            calibrate(model, batches)
        apart = F.kl_div(logits(model, batches), float_logits, reduction="batchmean", log_target=True)
        figures[preset] = float(apart), task_loss(model, batches)
        if preset:
            assert report.setup.applied
            assert len(report.setup.chosen) == (preset == "advanced")
    for preset in PRESETS:
        assert figures[preset][0] < figures[None][0], figures
        assert figures[preset][1] < figures[None][1] + 1e-3, figures
