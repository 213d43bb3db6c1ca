"""Distillation under both front ends, with their real trainers: injected gradients against the written loss."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    BertConfig,
    BertForMaskedLM,
    HfArgumentParser,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_integration import QuantArguments, QuantTrainer
from hf_integration.launch import main as hf_quant
from lightning_quant import QuantCallback, QuantConfig, QuantController
from lightning_quant.bypass import bypassed, evaluating
from lightning_quant.errors import CheckpointError, CoverageError
from lightning_quant.outputs import shares
from lightning_quant.spec import Distill
from tests.integration.modules import QUIET, Cnn, images, trainer
from tests.integration.processes import differing, result, run
from tests.integration.test_lightning import command_line, old_names
from tests.integration.tiny import VOCAB, causal_lm, token_rows

pytestmark = [
    *QUIET,
    # PEFT 0.21 still asks transformers for the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # torch.compile makes an object of an autograd function to read it, and looks for gradients of what breaks a graph.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]
WEIGHT, TEMPERATURE = 0.7, 2.0
DISTILL = {"weight": WEIGHT, "temperature": TEMPERATURE}


def rows(count: int = 32, ignored: int = 5) -> Dataset:
    """Rows whose first labels do not count, fewer of them in every other row."""
    made = token_rows(count)
    for i, row in enumerate(made):
        row["labels"] = [-100] * (ignored - i % 2) + row["labels"][ignored - i % 2 :]
    return Dataset.from_list(made)


def config(distill: object = DISTILL, method: str = "lsq", **settings: object) -> QuantConfig:
    return QuantConfig.parse(method, "w2a16-g32", distill=distill, **settings)


def hf(root: Path, model: nn.Module, quant: object, kind: type = QuantTrainer, **settings: object) -> Trainer:
    teacher = {"teacher": settings.pop("teacher")} if "teacher" in settings else {}
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0}
    args = TrainingArguments(str(root / "run"), dataloader_pin_memory=False, **{**defaults, **settings})
    made = kind(
        model=model, args=args, train_dataset=rows(), data_collator=default_data_collator, quant=quant, **teacher
    )
    made.train()
    return made


def logged(made: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


class Written(QuantTrainer):
    """The term written into the loss, next-token shift and all."""

    terms: list[float]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad(), bypassed(model, adapters=True), evaluating(model):
            taught = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        counts = inputs["labels"][:, 1:] != -100
        p, q = ((x[counts] / TEMPERATURE).log_softmax(-1) for x in (taught, outputs.logits[:, :-1]))
        term = WEIGHT * TEMPERATURE**2 * nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        self.__dict__.setdefault("terms", []).append(float(term.detach()))
        total = loss + term / self.current_gradient_accumulation_steps
        return (total, outputs) if return_outputs else total


# Hugging Face


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_injects_what_could_be_written(tmp_path, accumulate):
    settings = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    one = hf(tmp_path, causal_lm().double(), config(), **settings)
    two = hf(tmp_path, causal_lm().double(), config(None), Written, **settings)
    terms = torch.tensor(two.terms).view(-1, accumulate)
    # the log is of the task's loss alone, and of a step's last term
    assert logged(one) == pytest.approx([a - b for a, b in zip(logged(two), terms.mean(1).tolist(), strict=True)], 1e-5)
    assert logged(one, "quant_distill") == pytest.approx(terms[:, -1].tolist(), rel=1e-5)
    assert not logged(two, "quant_distill")
    torch.testing.assert_close(dict(one.model.state_dict()), dict(two.model.state_dict()), rtol=1e-4, atol=1e-5)
    plain = hf(tmp_path, causal_lm().double(), config(None), **settings)
    assert logged(plain)[0] == pytest.approx(logged(one)[0])
    assert abs(logged(plain)[-1] - logged(one)[-1]) > 1e-3
    assert plain.model.state_dict().keys() == one.model.state_dict().keys()
    assert sum(p.numel() for p in plain.model.parameters()) == sum(p.numel() for p in one.model.parameters())


@pytest.mark.parametrize(
    ("how", "close"),
    [("recomputed", 1e-5), ("compiled", 1e-4), ("bf16", 0.05)],
)
def test_trainer_in_other_ways(tmp_path, how, close):
    settings = {"compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"}, "bf16": {"bf16": True}}
    model = causal_lm()
    if how == "recomputed":
        model.activation_checkpointing_enable()
    want, made = hf(tmp_path, causal_lm(), config()), hf(tmp_path, model, config(), **settings.get(how, {}))
    assert logged(made) == pytest.approx(logged(want), rel=close)
    assert logged(made, "quant_distill") == pytest.approx(logged(want, "quant_distill"), rel=2 * close)


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(0.05 * torch.randn_like(p))
    return model


def test_teacher_of_adapters_is_the_model_they_were_given(tmp_path):
    base = causal_lm()
    free = hf(tmp_path, adapted(copy.deepcopy(base)), config())
    separate = hf(tmp_path, adapted(copy.deepcopy(base)), config(), teacher=base)
    assert logged(free, "quant_distill") == pytest.approx(logged(separate, "quant_distill"), rel=1e-5)
    assert logged(free) == pytest.approx(logged(separate), rel=1e-5)
    latent = hf(tmp_path, causal_lm(), config())
    assert abs(logged(latent, "quant_distill")[0] - logged(free, "quant_distill")[0]) > 1e-3
    trained = {n for n, p in free.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained)
    assert any("modules_to_save" in n for n in trained)


def test_hidden_states_of_a_transformer(tmp_path):
    made = hf(tmp_path, causal_lm(), config({"weight": 0.5, "hidden": 0.2}), max_steps=1)
    less = hf(tmp_path, causal_lm(), config(0.5), max_steps=1)
    model = causal_lm()
    control = QuantController(config(None))
    control.prepare(model)
    batch = next(iter(less.get_train_dataloader()))
    counts = (nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100).flatten()
    own = model.train()(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    with torch.no_grad(), bypassed(model), evaluating(model):
        other = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    want = [(a - b).square().mean(-1).flatten()[counts].mean() for a, b in zip(own, other, strict=True)]
    assert len(want) == 3
    added = logged(made, "quant_distill")[0] - logged(less, "quant_distill")[0]
    assert added == pytest.approx(0.2 * float(sum(want).detach()) / 3, rel=1e-3)


T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}


def test_positions_of_other_transformers():
    """What labels a position has is the model's business: masked models answer in place, decoders are not shifted."""
    labels = torch.tensor([[-100, 7, -100, 9]])
    logits = torch.zeros(1, 4, VOCAB)
    small = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked = BertForMaskedLM(BertConfig(**small, intermediate_size=16))
    decoder = T5ForConditionalGeneration(T5Config(**T5))
    assert shares(masked, {"labels": labels}, logits).tolist() == [[0, 0.5, 0, 0.5]]
    assert shares(decoder, {"labels": labels}, logits).tolist() == [[0, 0.5, 0, 0.5]]
    assert shares(causal_lm(), {"labels": labels}, logits).tolist() == [[0.5, 0, 0.5, 0]]
    assert shares(nn.ModuleList([causal_lm("opt")]), {"labels": labels}, logits).tolist() == [[0.5, 0, 0.5, 0]]


def test_decoder_that_is_fed_by_labels(tmp_path):
    made = hf(tmp_path, T5ForConditionalGeneration(T5Config(**T5)), config(), max_steps=2)
    assert all(value > 0 for value in logged(made, "quant_distill"))


def test_flags(tmp_path):
    causal_lm(seed=3).save_pretrained(tmp_path / "teacher")
    flags = ["--quant", "lsq", "--quant_scheme", "w2a16-g32", "--quant_distill", str(WEIGHT)]
    flags += ["--quant_distill_temperature", str(TEMPERATURE), "--quant_teacher", str(tmp_path / "teacher")]
    (quant,) = HfArgumentParser(QuantArguments).parse_args_into_dataclasses(flags)
    assert quant.to_config().distill == Distill(WEIGHT, TEMPERATURE)
    made = hf(tmp_path, causal_lm(), quant)
    want = hf(tmp_path, causal_lm(), config(), teacher=causal_lm(seed=3))
    assert logged(made, "quant_distill") == logged(want, "quant_distill")
    assert logged(made) == logged(want)
    free = hf(tmp_path, causal_lm(), config())
    assert logged(free, "quant_distill")[0] < 0.5 * logged(want, "quant_distill")[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_teacher": "."}, "--quant_teacher: expected a weight for what it says, got no --quant_distill"),
        ({"quant_distill_temperature": 2.0}, "--quant_distill_temperature: expected a weight as well"),
        ({"quant_distill": 1.0, "quant_teacher": "nowhere"}, "--quant_teacher: expected a directory, got 'nowhere'"),
        ({"quant_distill": -1.0}, r"Distill.weight: expected a number from 0 on, got -1.0"),
        ({"quant": "none", "quant_config": "x.yaml", "quant_distill": 1.0}, "got --quant_distill beside it"),
    ],
)
def test_flags_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        QuantArguments(**{"quant": "lsq", **given}).to_config()


def test_directory_without_a_teacher(tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"expected a model, got .*config.json"):
        QuantTrainer(quant=QuantArguments(quant="lsq", quant_distill=1.0, quant_teacher=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["MyLlama"]}')
    with pytest.raises(CheckpointError, match="expected a model class of transformers, got MyLlama"):
        QuantTrainer(quant=QuantArguments(quant="lsq", quant_distill=1.0, quant_teacher=str(tmp_path)))
    script = tmp_path / "script.py"
    script.write_text("from transformers import Trainer\nTrainer(model=None)\n")
    assert hf_quant([str(script), "--quant", "lsq", "--quant_distill", "1", "--quant_teacher", str(tmp_path)]) == 2
    assert "MyLlama" in capsys.readouterr().err


# Lightning


class Dropping(Cnn):
    """Dropout and batch normalization, which a second forward would disturb."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.head = nn.Sequential(nn.Dropout(0.3), self.head)


def fitted(root: Path, model: Cnn, distill: object = None, **settings: object) -> QuantCallback:
    own = {k: settings.pop(k) for k in ("teacher", "scheme") if k in settings}
    quant = QuantCallback("lsq", **{"scheme": "w2a8", **own}, distill=distill, options={"coverage": "error"})
    trainer(root, quant, max_epochs=1, **settings).fit(model, images(64))
    return quant


def cnn(kind: type = Cnn, **settings: float) -> Cnn:
    torch.manual_seed(0)
    return kind(**settings)


def test_callback_leaves_statistics_ranges_and_random_numbers_alone(tmp_path):
    """At a learning rate of 0 both runs compute the same forwards; only gradients differ."""
    plain, taught = cnn(Dropping, lr=0.0), cnn(Dropping, lr=0.0)
    torch.manual_seed(1)
    fitted(tmp_path, plain)
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    fitted(tmp_path, taught, 3.0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert plain.losses == taught.losses
    assert not differing(plain.state_dict(), taught.state_dict())
    assert plain.body[1].running_mean.abs().sum() > 0
    assert not taught._forward_hooks
    other, same = (dict(m.named_parameters())["head.1.weight"].grad for m in (taught, plain))
    assert not torch.allclose(other, same, atol=1e-3)


class WrittenCnn(Cnn):
    """The term written into the loss."""

    def training_step(self, batch, batch_idx):
        z = self(batch[0])
        with torch.no_grad(), bypassed(self), evaluating(self):
            y = self(batch[0])
        loss = nn.functional.cross_entropy(z, batch[1])
        self.losses.append(float(loss.detach()))
        p, q = ((x / TEMPERATURE).log_softmax(-1) for x in (y, z))
        return loss + WEIGHT * TEMPERATURE**2 * nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_callback_injects_what_could_be_written(tmp_path, accumulate):
    settings = {"accumulate_grad_batches": accumulate, "precision": "64-true"}
    logger = CSVLogger(tmp_path, version=0)
    one, two = cnn(), cnn(WrittenCnn)
    fitted(tmp_path, one, DISTILL, **settings, logger=logger, log_every_n_steps=2)
    fitted(tmp_path, two, **settings)
    assert one.losses == pytest.approx(two.losses, rel=1e-9)
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=1e-7, atol=1e-9)
    plain = cnn()
    fitted(tmp_path, plain, **settings)
    assert abs(plain.losses[-1] - one.losses[-1]) > 1e-3
    assert plain.state_dict().keys() == one.state_dict().keys()
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        values = [float(row["quant/distill"]) for row in csv.DictReader(file)]
    assert len(values) == 8 // accumulate // 2
    assert all(value > 0 for value in values)


def test_callback_with_a_teacher_of_ones_own(tmp_path):
    teacher = cnn(width=16)
    trainer(tmp_path, max_epochs=4).fit(teacher, images(64))
    before = copy.deepcopy(teacher.state_dict())
    one, two = cnn(), cnn()
    fitted(tmp_path, one, 5.0, teacher=teacher)
    fitted(tmp_path, two, 5.0)
    assert one.losses[0] == two.losses[0]
    assert one.losses[-1] != pytest.approx(two.losses[-1], rel=1e-3)
    assert not differing(teacher.state_dict(), before)
    assert teacher.training
    assert one.state_dict().keys() == two.state_dict().keys()


class Inner(Cnn):
    """A module that never calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.body, self.head)
        del self.body, self.head

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss


def test_callback_names_the_part_to_be_taught(tmp_path):
    with pytest.raises(CoverageError, match=r"outputs of Inner, got no call of it. .*distill=\{'module': 'net'\}"):
        fitted(tmp_path, cnn(Inner), 1.0)
    part, whole = cnn(Inner), cnn()
    fitted(tmp_path, part, {"weight": 1.0, "module": "net"})
    fitted(tmp_path, whole, 1.0)
    assert part.losses == pytest.approx(whole.losses, rel=1e-5)


def test_quantized_part_of_a_module_that_is_taught_as_a_whole(tmp_path):
    quant = QuantCallback("lsq", "w2a8", module="body", distill=DISTILL)
    model = cnn()
    trainer(tmp_path, quant, max_epochs=1).fit(model, images(64))
    assert quant.config.distill.module is None
    plain = cnn()
    trainer(tmp_path, QuantCallback("lsq", "w2a8", module="body"), max_epochs=1).fit(plain, images(64))
    assert model.losses[0] == plain.losses[0]
    assert model.losses[-1] != pytest.approx(plain.losses[-1], rel=1e-4)


@old_names
@pytest.mark.parametrize(
    ("given", "want"), [("0.5", Distill(0.5)), ("{weight: 0.25, temperature: 2}", Distill(0.25, 2.0))]
)
def test_command_line(tmp_path, monkeypatch, given, want):
    cli = command_line(
        tmp_path,
        monkeypatch,
        f"""
  - class_path: lightning_quant.QuantCallback
    init_args:
      distill: {given}
      teacher: {{class_path: torch.nn.Linear, init_args: {{in_features: 4, out_features: 4}}}}
""",
    )
    (quant,) = (c for c in cli.trainer.callbacks if isinstance(c, QuantCallback))
    assert quant.config.distill == want


class OneGraph(Cnn):
    """A training step that a compiler can take whole."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def test_compiled_module(tmp_path):
    """Student, teacher and loss are a graph each, compiled once."""
    eager, module = cnn(OneGraph), cnn(OneGraph)
    settings = {"scheme": "w4a16-channel", "precision": "64-true"}
    fitted(tmp_path, eager, DISTILL, **settings)
    torch._dynamo.reset()
    counters.clear()
    fitted(tmp_path, torch.compile(module, backend="aot_eager"), DISTILL, **settings)
    assert module.losses == pytest.approx(eager.losses, rel=1e-6)
    assert counters["stats"]["unique_graphs"] == 3


# Several processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    run("distill_run.py", "--out", out)
    return result(out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one(tmp_path, alone, strategy):
    run("distill_run.py", "--out", tmp_path, "--strategy", strategy, processes=2)
    ranks = [result(tmp_path, r) for r in (0, 1)]
    assert ranks[0]["losses"] == ranks[1]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert not differing(ranks[0]["state"], ranks[1]["state"])
    torch.testing.assert_close(ranks[0]["state"], alone["state"], rtol=1e-6, atol=1e-8)
