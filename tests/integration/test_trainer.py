"""QuantTrainer: transformers' own Trainer, quantized."""

from __future__ import annotations

import copy
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_integration import QuantArguments, QuantTrainer, load_training_checkpoint
from lightning_quant import LayerRule, QuantConfig, attach, detach
from lightning_quant.attach import is_attached, quantizers
from lightning_quant.checkpoint import CONFIG_FILE, STATE_FILE, save_quant_state
from lightning_quant.errors import AttachError, CheckpointError
from lightning_quant.export import verify
from lightning_quant.optim import learned_parameters, param_groups
from lightning_quant.quantizer import FakeQuantizer
from tests.integration.processes import differing
from tests.integration.tiny import causal_lm, token_batch, token_rows

PEGE = QuantConfig.parse("pege", "w4a16-g32")


def arguments(root: Path, **settings: object) -> TrainingArguments:
    defaults = {
        "output_dir": str(root / "run"),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return TrainingArguments(**{**defaults, **settings})


def dataset(rows: int = 32, seed: int = 0) -> Dataset:
    return Dataset.from_list(token_rows(rows, seed=seed))


def make(root: Path, quant: object = PEGE, model: PreTrainedModel | None = None, **settings: object) -> QuantTrainer:
    own = ("optimizers", "model_init", "callbacks", "eval_dataset", "train_dataset")
    more = {k: settings.pop(k) for k in own if k in settings}
    if "model_init" not in more:
        more["model"] = causal_lm() if model is None else model
    more.setdefault("train_dataset", dataset())
    return QuantTrainer(args=arguments(root, **settings), data_collator=default_data_collator, quant=quant, **more)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch(seed=9)).logits


# The optimizer


def test_attaches_before_the_optimizer_and_reports(tmp_path, capsys):
    model = causal_lm()
    trainer = make(tmp_path, model=model)
    assert trainer.optimizer is None
    assert is_attached(model)
    assert "14 quantized layers" in capsys.readouterr().out
    assert trainer.quant_report.coverage > 0.5
    trainer.train()
    assert sum(losses(trainer)[-2:]) < sum(losses(trainer)[:2])


def test_quantizer_parameters_have_groups_without_decay_that_the_scheduler_drives(tmp_path):
    trainer = make(tmp_path, weight_decay=0.3, lr_scheduler_type="linear", max_steps=4)
    trainer.train()
    mine = learned_parameters(trainer.model, PEGE)
    assert {f for _, f in mine.values()} == {PEGE.scale_lr, trainer.quant.estimator.state_lr}
    groups = trainer.optimizer.param_groups
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in trainer.model.parameters())
    decays = {True: set(), False: set()}
    for group in groups:
        members = {id(p) for p in group["params"]}
        assert members <= set(mine) or not members & set(mine)
        decays[bool(members & set(mine))].add(group["weight_decay"])
        for p in members & set(mine):
            assert group["initial_lr"] == pytest.approx(3e-3 * mine[p][1])
        assert group["lr"] == pytest.approx(0, abs=1e-9)  # linear decay has ended for every group
    assert decays == {True: {0.0}, False: {0.3, 0.0}}


def test_optimizer_of_the_user_without_the_quantizers_parameters_gets_them(tmp_path):
    model = causal_lm()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = make(tmp_path, model=model, optimizers=(optimizer, scheduler))
    mine = {id(p) for _, q in quantizers(model) for p in q.parameters()}
    before = {path: q.scale.clone() for path, q in quantizers(model)}
    trainer.train()
    added = [g for g in optimizer.param_groups if g.get("quantizer")]
    assert {id(p) for g in added for p in g["params"]} == mine
    own, *rates = scheduler.get_last_lr()
    assert [g["lr"] for g in added] == pytest.approx(rates)
    assert rates == pytest.approx([own * 0.1, own * 10])
    assert not any(torch.equal(q.scale, before[path]) for path, q in quantizers(model))


@pytest.mark.parametrize("by_hand", [False, True])
def test_optimizer_of_the_user_built_after_attaching(tmp_path, by_hand):
    model = causal_lm()
    attach(model, PEGE)
    groups = param_groups(model, PEGE, lr=3e-3, weight_decay=0.1) if by_hand else model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = make(tmp_path, model=model, optimizers=(optimizer, scheduler))
    before = {p: q.scale.detach().clone() for p, q in quantizers(model)}
    trainer.train()
    rates = sorted({round(g["lr"], 9) for g in optimizer.param_groups})
    assert rates == pytest.approx([3e-4, 3e-3, 3e-2])
    assert all(not torch.equal(before[p], q.scale) for p, q in quantizers(model))


def test_model_init(tmp_path):
    made = []

    def build() -> PreTrainedModel:
        made.append(causal_lm(seed=len(made)))
        return made[-1]

    trainer = make(tmp_path, model_init=build)
    trainer.train()
    assert len(made) == 2
    assert trainer.model is made[1]
    assert trainer.quant.model is made[1]
    assert all(bool(q.theta.any()) for _, q in quantizers(trainer.model))
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in trainer.model.parameters()}


# The training directory


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8-static"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_directory(tmp_path, tied, scheme):
    config = QuantConfig.parse("pege", scheme)
    trainer = make(tmp_path, config, model=causal_lm(tied=tied), save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    plain = causal_lm(tied=tied)
    plain.save_pretrained(tmp_path / "plain")
    keys = set(load_file(tmp_path / "plain" / "model.safetensors"))
    expected = logits(trainer.model)
    for directory in (tmp_path / "final", tmp_path / "run" / "checkpoint-6"):
        assert set(load_file(directory / "model.safetensors")) == keys
        assert {STATE_FILE, CONFIG_FILE} <= {f.name for f in directory.iterdir()}
        assert not list(directory.glob("*tmp*"))
        reader, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
        assert not is_attached(reader)
        back = load_training_checkpoint(directory)
        assert torch.equal(logits(back), expected)
        assert not torch.equal(logits(reader), expected)
        mine = {n: v for n, v in back.state_dict().items() if "_quant." in n}
        assert mine.keys() == load_file(directory / STATE_FILE).keys()
        for name, value in mine.items():
            assert torch.equal(trainer.model.state_dict()[name], value), name
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(load_training_checkpoint(tmp_path / "final", given)), expected)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def of_another_model(file: Path) -> None:
    other = causal_lm()
    attach(other, QuantConfig.parse("lsq", "w4a16-g32"))
    save_quant_state(file.parent, {n: v for n, v in other.state_dict().items() if "_quant." in n}, PEGE)


DAMAGE = {
    "no state": (STATE_FILE, Path.unlink, rf"expected {STATE_FILE} beside the weights, got none\. .*take a checkpoint"),
    "state cut": (STATE_FILE, cut, r"expected a whole safetensors file, got .*\. Take an earlier checkpoint"),
    "other state": (STATE_FILE, of_another_model, r"state of the 28 tensors .*theta\. Attach with the directory's"),
    "no config": (CONFIG_FILE, Path.unlink, rf"expected a training directory with {CONFIG_FILE}, got none\. Point at"),
    "config cut": (CONFIG_FILE, cut, r"expected JSON, got .*\. Take an earlier checkpoint"),
    "weights cut": ("model.safetensors", cut, r"expected whole weight files, got .*\. Take an earlier checkpoint"),
}


@pytest.fixture(scope="module")
def checkpoint_3(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    make(root, save_strategy="steps", save_steps=3, max_steps=3).train()
    return root / "run" / "checkpoint-3"


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_training_directory(tmp_path, checkpoint_3, name):
    directory = tmp_path / "checkpoint-3"
    shutil.copytree(checkpoint_3, directory)
    file, harm, message = DAMAGE[name]
    harm(directory / file)
    with pytest.raises(CheckpointError, match=message):
        load_training_checkpoint(directory)
    trainer = make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(directory))
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("change", ["scheme", "method", "rule", "option"])
def test_resuming_with_another_config_is_refused(tmp_path, checkpoint_3, change):
    other = {
        "scheme": QuantConfig.parse("pege", "w2a16-g32"),
        "method": QuantConfig.parse("lsq", "w4a16-g32"),
        "rule": QuantConfig.parse("pege", "w4a16-g32", rules=[LayerRule("*.0.*.q_proj", weight=None)]),
        "option": QuantConfig.parse("pege", "w4a16-g32", lam=0.5),
    }[change]
    trainer = make(tmp_path, other)
    with pytest.raises(ValueError, match=r"expected the checkpoint's .*\. Resume with the config the run was started"):
        trainer.train(resume_from_checkpoint=str(checkpoint_3))
    assert trainer.state.global_step == 0


def test_resuming_goes_on_where_the_run_was_and_says_nothing_alarming(tmp_path, checkpoint_3, caplog):
    whole = make(tmp_path / "whole")
    whole.train()
    trainer = make(tmp_path)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint_3))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "missing keys" not in caplog.text
    assert [q for _, q in quantizers(trainer.model)]
    assert trainer.quant.values()["lam"] == whole.quant.values()["lam"] > 0


class Begin(TrainerCallback):
    """Notes the model's state when training begins."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.state = {n: v.clone() for n, v in model.state_dict().items()}


def test_resuming_from_the_model_alone(tmp_path):
    first = make(tmp_path, save_strategy="steps", save_steps=3, max_steps=3, save_only_model=True)
    first.train()
    assert not (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").exists()
    begin = Begin()
    rest = make(tmp_path, callbacks=[begin])
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 6
    assert differing(begin.state, dict(first.model.state_dict())) == []


def test_best_model_brings_its_quantizers_back(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:  # after the checkpoint at step 4, everything gets worse
                with torch.no_grad():
                    for _, q in quantizers(model):
                        q.scale.mul_(20)

    trainer = make(
        tmp_path,
        eval_dataset=dataset(8, seed=1),
        callbacks=[Spoil()],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith(("checkpoint-2", "checkpoint-4"))
    assert torch.equal(logits(trainer.model), logits(load_training_checkpoint(best)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


class Scores(TrainerCallback):
    """Notes the best checkpoint after every step."""

    def __init__(self) -> None:
        self.best: dict[int, str | None] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.best[state.global_step] = state.best_model_checkpoint

    def on_epoch_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)


def delayed(root: Path, *callbacks: TrainerCallback, **settings: object) -> QuantTrainer:
    """Quantized from step 4 on, scored every 2 of 8 steps; the first score is the best by far."""

    class Worse(QuantTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_place"] = float(self.state.global_step)
            return metrics

    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", **settings}
    settings |= {"save_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_place"}
    return Worse(
        model=causal_lm(),
        args=arguments(root, greater_is_better=False, **settings),
        data_collator=default_data_collator,
        train_dataset=dataset(),
        eval_dataset=dataset(8, seed=1),
        callbacks=list(callbacks),
        quant=QuantConfig.parse("pege", "w4a16-g32", delay=4),
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_best_is_forgotten_once_when_quantization_starts(tmp_path, capsys, accumulate):
    scores = Scores()
    trainer = delayed(tmp_path, scores, gradient_accumulation_steps=accumulate)
    trainer.train()
    names = {step: None if path is None else Path(path).name for step, path in scores.best.items()}
    assert names[2] == names[3] == names[4] == "checkpoint-2"
    assert names[5] is None
    assert names[6] == names[7] == "checkpoint-6"
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
    assert trainer.state.best_metric == 6
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    best = load_training_checkpoint(tmp_path / "run" / "checkpoint-6")
    assert torch.equal(logits(trainer.model), logits(best))
    said = [line for line in capsys.readouterr().out.splitlines() if "forgotten" in line]
    assert said == [f"training is quantized from step 4 on; forgotten as best: 2 of {tmp_path}/run/checkpoint-2"]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_best_is_forgotten_once_whenever_the_run_is_resumed(tmp_path, capsys, step):
    delayed(tmp_path).train()
    last = tmp_path / "run" / "checkpoint-8"
    whole = [load_file(last / name) for name in ("model.safetensors", STATE_FILE)]
    shutil.rmtree(last)
    capsys.readouterr()
    trainer = delayed(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    for before, name in zip(whole, ("model.safetensors", STATE_FILE), strict=True):
        assert differing(before, load_file(last / name)) == []
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
    assert capsys.readouterr().out.count("forgotten as best") == (step <= 4)


# Training and evaluation


def test_metrics_are_logged_on_logging_steps_and_only_then_is_anything_measured(tmp_path, monkeypatch):
    trainer, measured = None, []
    real = FakeQuantizer._measure

    def measure(self, *args):
        measured.append(trainer.state.global_step + 1)
        return real(self, *args)

    monkeypatch.setattr(FakeQuantizer, "_measure", measure)
    trainer = make(
        tmp_path, QuantConfig.parse("pege", "w4a8-static-g32"), logging_steps=3, max_steps=8, logging_first_step=True
    )
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["step"] for e in entries] == [1, 3, 6]
    assert sorted(set(measured)) == [1, 3, 6]
    for entry in entries:
        names = {"lam", "sharpness", "theta", "theta_max", "progressive_loss", "error", "input_error"}
        names |= {"clip", "input_clip", "flips", "scale_drift"}
        assert {k for k in entry if k.startswith("quant_")} == {f"quant_{n}" for n in names}
        assert all(math.isfinite(v) for v in entry.values())
        assert 0 < entry["quant_error"] < 0.1
        assert entry["quant_lam"] == pytest.approx(trainer.quant.values(entry["step"] - 1)["lam"])
    assert entries[0]["quant_error"] != entries[1]["quant_error"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_logging_by_epoch_measures_the_epoch_s_last_step(tmp_path, monkeypatch, accumulate):
    trainer, measured = None, []
    real = FakeQuantizer._measure

    def measure(self, *args):
        measured.append(trainer.state.global_step + 1)
        return real(self, *args)

    monkeypatch.setattr(FakeQuantizer, "_measure", measure)
    trainer = make(
        tmp_path,
        max_steps=-1,
        num_train_epochs=2,
        logging_strategy="epoch",
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    entries = [e for e in trainer.state.log_history if "loss" in e]
    per_epoch = math.ceil(8 / accumulate)
    assert [e["step"] for e in entries] == [per_epoch, 2 * per_epoch]
    assert sorted(set(measured)) == [per_epoch, 2 * per_epoch]
    assert all("quant_error" in e for e in entries)


@pytest.mark.parametrize("method", ["pege", "pege_replace"])
def test_evaluation_is_hard(tmp_path, method):
    trainer = make(tmp_path, QuantConfig.parse(method, "w2a16-g32"), eval_dataset=dataset(8, seed=1), max_steps=3)
    trainer.train()
    if method == "pege_replace":
        assert 0 < trainer.quant.values()["share"] < 1
    folded = detach(copy.deepcopy(trainer.model), fold=True)
    assert not is_attached(folded)
    plain = Trainer(
        model=folded, args=trainer.args, eval_dataset=dataset(8, seed=1), data_collator=default_data_collator
    )
    expected = plain.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected
    latent = detach(copy.deepcopy(trainer.model), fold=False)
    plain.model = plain.model_wrapped = latent
    assert plain.evaluate()["eval_loss"] != expected


def test_nothing_stays_open_when_training_ends(tmp_path):
    trainer = make(tmp_path, QuantConfig.parse("ste", "w8a8-static"), max_steps=2)
    trainer.train()
    assert not any(q.observing or q.measuring for _, q in quantizers(trainer.model))
    assert is_attached(trainer.model)


def weights_after(root: Path, accumulate: int, lam: float, steps: int = 2) -> dict[str, torch.Tensor]:
    config = QuantConfig.parse("pege", "w4a8-g32", lam=lam)
    model = causal_lm()
    trainer = make(
        root,
        config,
        model=model,
        max_steps=steps,
        per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    assert trainer.model_accepts_loss_kwargs  # the Trainer normalises by num_items_in_batch
    trainer.train()
    return dict(model.state_dict())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_scales_the_progressive_term(tmp_path, accumulate):
    whole, parts = weights_after(tmp_path, 1, 0.05), weights_after(tmp_path, accumulate, 0.05)
    without = weights_after(tmp_path, 1, 0.0)
    name = "model.layers.0.mlp.up_proj.weight"
    effect = (whole[name] - without[name]).norm()
    assert effect > 0
    assert (whole[name] - parts[name]).norm() < 0.02 * effect
    theta = name.replace("weight", "weight_quant.theta")
    assert (whole[theta] - parts[theta]).norm() < 0.02 * (whole[theta] - without[theta]).norm()


def term_alone(root: Path, kind: type[QuantTrainer], accumulate: int, batch_loss: object) -> dict[str, torch.Tensor]:
    """What an epoch of five batches changes where the task's loss is zero."""
    settings = {"per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 1, "max_grad_norm": 0.0}
    settings |= {"optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    model = causal_lm()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    trainer = kind(
        model=model,
        args=arguments(root, gradient_accumulation_steps=accumulate, **settings),
        data_collator=default_data_collator,
        train_dataset=dataset(10),
        compute_loss_func=batch_loss,
        quant=QuantConfig.parse("pege", "w4a16-g32", lam=0.05),
    )
    trainer.train()
    assert trainer.state.global_step == math.ceil(5 / accumulate)
    return {n: v - before[n] for n, v in model.state_dict().items() if n in before}


@pytest.mark.parametrize("own", [False, True])
def test_progressive_term_counts_once_per_step_whatever_normalizes_the_loss(tmp_path, own):
    """A loss of zero leaves the term alone: its gradient is summed over a window's micro-batches once, not per item."""

    def nothing(outputs, labels, num_items_in_batch=None):
        assert num_items_in_batch is not None
        return 0.0 * outputs.logits.sum()

    class Zero(QuantTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 0.0 * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    name = "model.layers.0.mlp.up_proj.weight"
    found = {}
    for accumulate in (1, 5, 2):
        trainer_class = QuantTrainer if own else Zero
        found[accumulate] = term_alone(tmp_path, trainer_class, accumulate, nothing if own else None)[name]
    assert found[5].norm() > 0
    for accumulate, steps in ((1, 5), (2, 3)):  # windows of 2, 2 and 1 batches
        assert (found[accumulate] - steps * found[5]).norm() < 0.02 * found[accumulate].norm()


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = []
    for recompute in (False, True):
        trainer = make(tmp_path, QuantConfig.parse("pege", "w4a8-static-g32"), activation_checkpointing=recompute)
        trainer.train()
        runs.append(trainer)
    assert runs[1].model.is_activation_checkpointing
    assert losses(runs[0]) == losses(runs[1])
    for name, value in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[name], value), name


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_bf16(tmp_path, scheme):
    trainer = make(tmp_path, QuantConfig.parse("pege", scheme), bf16=True, max_steps=10)
    trainer.train()
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])
    assert {p.dtype for _, q in quantizers(trainer.model) for p in q.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_script_saves_by_itself_has_the_float_model_s_keys(tmp_path, tied):
    trainer = make(tmp_path, model=causal_lm(tied=tied), max_steps=1)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "own")
    causal_lm(tied=tied).save_pretrained(tmp_path / "plain")
    assert file_keys(tmp_path / "own") == file_keys(tmp_path / "plain")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(info.values()), info


def file_keys(directory: Path) -> set[str]:
    return set(load_file(directory / "model.safetensors"))


def test_without_quant_it_is_the_plain_trainer(tmp_path):
    ours = make(tmp_path / "ours", None, save_strategy="steps", save_steps=6)
    plain = Trainer(
        model=causal_lm(),
        args=arguments(tmp_path / "plain"),
        train_dataset=dataset(),
        data_collator=default_data_collator,
    )
    ours.train()
    plain.train()
    assert losses(ours) == losses(plain)
    assert len(losses(ours)) == 6
    assert not is_attached(ours.model)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name
    assert not list((tmp_path / "ours").rglob("quant_*"))
    assert not any(k.startswith("quant_") for e in ours.state.log_history for k in e)
    with pytest.raises(ValueError, match=r"expected a quantized training, got quant=None\. Pass quant="):
        ours.export(tmp_path / "out")


def test_model_that_cannot_be_quantized_is_refused_by_the_constructor(tmp_path):
    with pytest.raises(AttachError, match=r"group_size=48 does not divide in_features=64"):
        make(tmp_path, QuantConfig.parse("pege", "w4a16-g48"))


# Export


def test_export_by_method(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    report = trainer.export(tmp_path / "out")
    assert report.format == "compressed-tensors"
    assert is_attached(trainer.model)
    reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reader), logits(trainer.model))
    trainer.export(tmp_path / "folded", format="folded")
    assert verify(tmp_path / "folded", trainer.model).ok


def test_export_by_flag_when_training_ends(tmp_path):
    flags = QuantArguments(quant="lsq", quant_scheme="w4a16-g32", quant_export=str(tmp_path / "out"))
    trainer = make(tmp_path, flags)
    assert not (tmp_path / "out").exists()
    trainer.train()
    assert verify(tmp_path / "out", trainer.model).ok


def test_existing_export_directory_is_refused_before_training(tmp_path):
    (tmp_path / "out").mkdir()
    trainer = make(tmp_path, QuantArguments(quant="lsq", quant_scheme="w4a16-g32", quant_export=str(tmp_path / "out")))
    with pytest.raises(FileExistsError, match=r"expected a directory that does not exist yet, got .*\. Choose another"):
        trainer.train()
    assert trainer.state.global_step == 0


# Flags


def parse(*words: str) -> QuantArguments:
    (quant,) = HfArgumentParser(QuantArguments).parse_args_into_dataclasses(list(words), look_for_args_file=False)
    return quant


def test_flags_beside_a_script_s_own_dataclasses():
    words = ["--output_dir", "out", "--quant", "dsq", "--quant_scheme", "w8a8", "--max_steps", "3"]
    args, quant = HfArgumentParser((TrainingArguments, QuantArguments)).parse_args_into_dataclasses(
        words, look_for_args_file=False
    )
    assert args.max_steps == 3
    assert quant.to_config() == QuantConfig.parse("dsq", "w8a8")


def test_flags_make_the_config():
    words = (
        "--quant pege --quant_scheme w2a16-g32 --quant_calibration 7 --quant_theta element --quant_target transformers"
    )
    assert parse(*words.split()).to_config() == QuantConfig.parse(
        "pege", "w2a16-g32", calibration=7, theta="element", target="transformers"
    )
    assert parse().to_config() is None
    assert parse("--quant", "none", "--quant_scheme", "w2a16").to_config() is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("delta=0.01", 0.01),
        ("delta=1e-3", 0.001),
        ("delta=-2E+1", -20.0),
        ("a=true", True),
        ("a=null", None),
        ("a=3", 3),
        ("a=group", "group"),
        ("a=x=y", "x=y"),
        ("lam={curve: linear, start: 0, end: 1e-2}", {"curve": "linear", "start": 0, "end": 0.01}),
    ],
)
def test_values_of_options(text, value):
    quant = parse("--quant", "ewgs", "--quant_option", text)
    assert quant._values() == {text.partition("=")[0]: value}
    assert type(quant._values()[text.partition("=")[0]]) is type(value)


def test_options_add_up():
    once = parse("--quant", "pege", "--quant_option", "theta=channel", "initial=0.5")
    twice = parse("--quant", "pege", "--quant_option", "theta=channel", "--quant_option", "initial=0.5")
    assert once.to_config() == twice.to_config() == QuantConfig.parse("pege", "w4a16", theta="channel", initial=0.5)
    assert parse().quant_option == []


def test_config_file(tmp_path):
    PEGE.to_yaml(tmp_path / "quant.yaml")
    assert parse("--quant_config", str(tmp_path / "quant.yaml")).to_config() == PEGE


BAD_FLAGS = {
    "--quant peg": r"expected one of .*, got 'peg'\. Did you mean method 'pege'\?",
    "--quant pege --quant_scheme w4b16": r"expected the form .*, got the part 'w4b16'\. Ready-made schemes",
    "--quant pege --quant_option theta": r"--quant_option: expected key=value, got 'theta'\. For example",
    "--quant pege --quant_option =3": "expected key=value",
    "--quant pege --quant_option lam={a": r"--quant_option lam: expected YAML after =, got .*\. For example",
    "--quant pege --quant_option thata=group": r"expected one of .*, got 'thata'\. Did you mean option 'theta'\?",
    "--quant pege --quant_option initial=abc": r"--quant_option.*abc",
    "--quant lsq --quant_theta group": "options of method 'lsq': expected",
    "--quant pege --quant_theta elemnt": r"got 'elemnt'\. Did you mean theta 'element'\?",
    "--quant pege --quant_calibration -1": "expected 0 or more optimizer steps, got -1",
    "--quant pege --quant_target vlm": "Did you mean target 'vllm'",
    "--quant pege --quant_format gguff": r"--quant_format: expected one of .*, got 'gguff'",
    "--quant pege --quant_config x.yaml": r"--quant_config: expected to stand alone, got --quant beside it\. Drop one",
    "--quant_config x.yaml --quant_calibration 3": "got --quant_calibration beside it",
    "--quant_config x.yaml": r"--quant_config: expected a YAML file, got 'x\.yaml'\. QuantConfig\.to_yaml writes one",
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags(words):
    with pytest.raises(ValueError, match=BAD_FLAGS[words]):
        parse(*words.split()).to_config()


def test_bad_config_file(tmp_path):
    (tmp_path / "quant.yaml").write_text("method: [pege")
    with pytest.raises(ValueError, match=r"--quant_config: expected YAML, got .*\. Mend .*quant\.yaml"):
        parse("--quant_config", str(tmp_path / "quant.yaml")).to_config()
