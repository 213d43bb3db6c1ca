"""Learned rotations: the float function stays, and the quantized model's loss on the calibration data falls."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel, TrainingArguments, default_data_collator

from hf_integration import QuantTrainer
from lightning_quant import LayerRule, QuantCallback, QuantConfig, TensorSpec
from lightning_quant.transforms import TransformReport, rotate, spinquant
from tests.integration.modules import QUIET, trainer
from tests.integration.processes import differing, result, run
from tests.integration.text import CALIBRATION, batch, loss_of, plant, quantized_loss, trained
from tests.integration.tiny import causal_lm, token_batch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
from architectures import FAMILIES

pytestmark = QUIET
SAME = 1e-5


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A Llama that learned some English, with three channels 50 times too large in what its layers read."""
    torch.set_num_threads(1)
    return plant(trained("llama"), 50.0)


@torch.no_grad()
def logits(model: nn.Module, given: dict[str, Tensor] = CALIBRATION[0]) -> Tensor:
    return model(**given).logits


def moved(model: nn.Module, start: Tensor) -> float:
    return float((logits(model) - start).abs().max() / start.abs().max())


def losses(report: TransformReport) -> list[float]:
    """What the report says: by random rotations, and by learned ones."""
    (what,) = {a.what for a in report.applied}
    return [float(x) for x in re.findall(r"\d+\.\d+", what)]


@pytest.mark.parametrize("scheme", ["w4a8-g32", "w4a4-g32"])
def test_learned_rotations_lose_less_than_random_ones(model, scheme):
    """Measured on models with real quantizers; the report's losses are theirs."""
    config = QuantConfig.parse("ste", scheme)
    plain, turned, learned = (copy.deepcopy(model) for _ in range(3))
    start, real = logits(model), loss_of(model, CALIBRATION)
    rotate(turned, CALIBRATION)
    report = spinquant(learned, CALIBRATION, config, steps=20)
    assert len(report.applied) == 3  # the stream, and each layer's values
    assert report.difference < SAME
    assert moved(learned, start) < SAME
    outlying, random, best = (quantized_loss(m, config, CALIBRATION) for m in (plain, turned, learned))
    assert outlying > random + 0.05
    assert best - real < 0.9 * (random - real)
    assert losses(report) == pytest.approx([random, best], abs=2e-3)  # four digits, and weights rounded once more


def test_what_is_fused_is_orthogonal(model):
    """Embeddings were multiplied with R1, and values with R2, so that both can be solved for."""
    learned = copy.deepcopy(model)
    spinquant(learned, CALIBRATION[:1], QuantConfig.parse("ste", "w4a4-g32"), steps=5)
    before, after = (m.model.embed_tokens.weight.double() for m in (model, learned))
    r1 = torch.linalg.lstsq(before, after).solution
    torch.testing.assert_close(before @ r1, after, atol=1e-5, rtol=0)
    torch.testing.assert_close(r1 @ r1.T, torch.eye(64, dtype=torch.float64), atol=1e-5, rtol=0)
    random = copy.deepcopy(model)
    rotate(random, CALIBRATION)
    assert not torch.allclose(random.model.embed_tokens.weight, learned.model.embed_tokens.weight, atol=1e-3)
    size = model.config.head_dim
    turned = []
    for old, new in zip(model.model.layers, learned.model.layers, strict=True):
        scale = old.input_layernorm.weight.double()
        v, w = old.self_attn.v_proj.weight.double() * scale @ r1, new.self_attn.v_proj.weight.double()
        r2 = torch.linalg.lstsq(w[:size].T, v[:size].T).solution.T  # v = R2 w, head by head
        torch.testing.assert_close(r2 @ r2.T, torch.eye(size, dtype=torch.float64), atol=1e-4, rtol=0)
        torch.testing.assert_close(r2 @ w[size:], v[size:], atol=1e-4, rtol=0)
        turned.append(r2)
    assert not torch.allclose(turned[0], turned[1], atol=1e-2)  # one for each layer


def test_never_worse_than_random_rotations(model):
    """Where nothing is gained, the result is that of ``rotate``, bit for bit."""
    config = QuantConfig.parse("ste", "w8a8")
    learned, random = copy.deepcopy(model), copy.deepcopy(model)
    report = spinquant(learned, CALIBRATION[:2], config, steps=1, lr=1e-12)
    rotate(random, CALIBRATION)
    first, best = losses(report)
    assert best <= first
    start, got = (quantized_loss(m, config, CALIBRATION[:2]) for m in (random, learned))
    assert got <= start + 1e-6


def test_a_head_that_is_the_embedding_turns_with_it():
    """The loss that is learned from is that of the model with quantizers, the head's included."""
    model = causal_lm("llama", tied=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)  # a scale could not move into a weight that is shared
    start, learned, random = logits(model), copy.deepcopy(model), copy.deepcopy(model)
    config = QuantConfig.parse("ste", "w4a4-g32", head=True, rules=[LayerRule("lm_head", TensorSpec(8), None)])
    report = spinquant(learned, CALIBRATION[:1], config, steps=4)
    rotate(random, CALIBRATION)
    assert moved(learned, start) < SAME
    assert learned.lm_head.weight is learned.model.embed_tokens.weight
    assert not torch.allclose(learned.lm_head.weight, model.lm_head.weight, atol=1e-2)
    want = [quantized_loss(m, config, CALIBRATION[:1]) for m in (random, learned)]
    assert losses(report) == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("labels", [True, False])
def test_half_precision_and_batches_without_labels(labels):
    """Without a loss in the output, the distance from the float model's is what falls."""
    model = causal_lm("llama").bfloat16()
    plant(model, 50.0)
    data = [batch(0)] if labels else [token_batch(8)]
    start, config = logits(model.float(), data[0]), QuantConfig.parse("ste", "w4a4-g32")
    model.bfloat16()
    report = spinquant(model, data, config, steps=10)
    first, best = losses(report)
    assert best < first
    assert report.difference < SAME  # in float32; then weights are rounded to what they were
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert float((logits(model.float(), data[0]) - start).abs().max() / start.abs().max()) < 0.1


@pytest.mark.parametrize(
    ("family", "why"),
    [("opt", "spinquant: expected RMS normalization without a bias, got LayerNorm at model.decoder")],
)
def test_models_that_do_not_turn_say_why(family, why):
    model = causal_lm(family)
    before = copy.deepcopy(model.state_dict())
    report = spinquant(model, [token_batch()], QuantConfig.parse("ste", "w4a4-g32"), heads=False)
    assert report.applied == []
    assert why in str(report)
    assert differing(before, model.state_dict()) == []


def test_fused_experts_write_to_a_stream_that_does_not_turn():
    """Values within heads still do."""
    torch.manual_seed(0)
    model, given = FAMILIES["mixtral"].build().eval(), FAMILIES["mixtral"].inputs()
    start = logits(model, given)
    report = spinquant(model, [given], QuantConfig.parse("ste", "w4a4-g32"), steps=3)
    assert "got a change of" in report.refused["MixtralForCausalLM"]
    assert [a.producer.rpartition(".")[2] for a in report.applied] == ["v_proj", "v_proj"]
    assert float((logits(model, given) - start).abs().max() / start.abs().max()) < SAME


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0}])
def test_bad_settings(options):
    with pytest.raises(ValueError, match="spinquant: expected at least one step, and a rate above 0, got steps="):
        spinquant(causal_lm(), [token_batch()], QuantConfig.parse("ste", "w4a4-g32"), **options)


class Brittle(nn.Module):
    """Has a loss as long as its model computes nearly what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.net = causal_lm("llama").eval()
        self.wanted = logits(self.net, token_batch())

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        z = self.net(**given).logits
        return {"logits": z, "loss": -(1 - (1e3 * (z - self.wanted).abs().amax()).tanh()).log()}


def test_a_loss_that_is_no_number_is_an_error():
    """And leaves the float model as it was."""
    model, config = Brittle(), QuantConfig.parse("ste", "w4a4-g32")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="spinquant: expected a finite loss of the quantized model, got inf on batch 0"
    ):
        spinquant(model, [token_batch()], config, steps=2)
    assert differing(before, model.state_dict()) == []
    with torch.no_grad():
        model.net.lm_head.weight[5, 5] = torch.inf
    with pytest.raises(ValueError, match="expected outputs that are numbers, got NaN"):
        spinquant(model.net, CALIBRATION[:1], config)


SETUP = [{"name": "spinquant", "steps": 3}]


class Module(L.LightningModule):
    """Computes its loss itself, so that the model in it returns none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = causal_lm("llama")

    def training_step(self, rows: list[Tensor], batch_idx: int) -> Tensor:
        z = self.net(input_ids=rows[0]).logits
        return nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), rows[0][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_lightning(tmp_path):
    module, by_hand = Module(), Module()
    rows = torch.cat([batch(i)["input_ids"] for i in range(2)])
    quant = QuantCallback("ste", "w4a4-g32", setup=SETUP)
    trainer(tmp_path, quant, max_epochs=1).fit(module, DataLoader(TensorDataset(rows), batch_size=16))
    assert len(quant.report.setup.applied) == 3
    spinquant(by_hand.net, [{"input_ids": part} for part in rows.split(16)], quant.config, steps=3)
    names = by_hand.state_dict()
    assert differing(names, {k: v for k, v in module.state_dict().items() if k in names}) == []


def test_trainer(tmp_path: Path):
    data = Dataset.from_list([{k: v[i].tolist() for k, v in batch(0).items()} for i in range(8)])
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.0, "report_to": "none", "use_cpu": True}
    made = QuantTrainer(
        model=causal_lm(),
        args=TrainingArguments(str(tmp_path), max_steps=1, disable_tqdm=True, **settings),
        train_dataset=data,
        data_collator=default_data_collator,
        quant=QuantConfig.parse("ste", "w4a4-g32", setup=SETUP),
    )
    report = made.quant_report.setup
    assert len(report.applied) == 3
    assert 3 < losses(report)[1] <= losses(report)[0] < 8  # the model's own loss, which it has labels for
    made.train()


def test_every_rank_ends_with_the_same_weights(tmp_path):
    run("spinquant_run.py", "--out", tmp_path, processes=2)
    ranks = [result(tmp_path, r) for r in (0, 1)]
    assert differing(ranks[0], ranks[1]) == []
    start = causal_lm("llama").state_dict()
    assert not torch.allclose(start["model.embed_tokens.weight"], ranks[0]["model.embed_tokens.weight"])
