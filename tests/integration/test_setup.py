"""Set-up transforms in both front ends: once, on the float model, the same on every rank, not again on resuming."""

from __future__ import annotations

from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
import yaml
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator

from hf_integration import QuantArguments, QuantTrainer, load_training_checkpoint
from hf_integration.launch import quantized_trainers
from lightning_quant import QuantCallback, QuantConfig, QuantController
from lightning_quant.errors import AttachError
from lightning_quant.transforms import Inputs, smoothquant
from lightning_quant.transforms.capture import first_call
from lightning_quant.transforms.setup import refuse_unfit, set_up
from tests.integration.modules import QUIET, Cnn, Words, images, trainer, words
from tests.integration.processes import differing, result, run
from tests.integration.tiny import causal_lm, token_batch, token_rows

pytestmark = QUIET
BOTH = ["smoothquant", {"name": "equalize", "relu6": False}]


def module(kind: type = Words) -> L.LightningModule:
    torch.manual_seed(0)
    return kind()


def shuffled(rows: int = 32) -> DataLoader:
    return DataLoader(words(rows).dataset, batch_size=8, shuffle=True)


# ---- the config


def test_yaml_and_back(tmp_path):
    config = QuantConfig.parse("ste", "w8a8", setup=BOTH, setup_batches=3)
    assert config.setup == tuple(BOTH)
    config.to_yaml(tmp_path / "c.yaml")
    assert QuantConfig.from_yaml(tmp_path / "c.yaml") == config
    text = yaml.safe_dump({"version": 1, "setup": ["awq", {"name": "smoothquant", "alpha": "search"}]})
    (tmp_path / "d.yaml").write_text(text)
    assert QuantConfig.from_yaml(tmp_path / "d.yaml").setup == ("awq", {"name": "smoothquant", "alpha": "search"})
    assert QuantConfig.parse("ste", "w8a8", setup="awq").setup == ("awq",)


@pytest.mark.parametrize(
    ("setup", "match"),
    [
        ("smoothqant", "expected one of .* got 'smoothqant'. Did you mean transform 'smoothquant'"),
        ([{"name": "awq", "point": 3}], r"QuantConfig.setup: awq: expected one of clip, points, got 'point'"),
        ([{"name": "reestimate_bn", "x": 1}], r"one of \(none\)"),
        ("gtpq", r"expected one of absorb_bias, awq, .* \(transforms\); lapq \(choice of ranges\); adaquant, .* gptq"),
        ("gtpq", r"data_free, light, advanced \(presets\), got 'gtpq'. Did you mean rounding 'gptq'?"),
        ("ligth", "Did you mean preset 'light'?"),
        ([{"name": "gptq", "dampen": 1}], "rounding 'gptq': expected one of .* Did you mean option 'damping'?"),
        ([{"name": "gptq", "damping": 0}], "gptq: expected damping > 0"),
        ([{"name": "lapq", "rounds": 1}], "QuantConfig.setup: lapq: expected one of evaluations, iterations, metric"),
        (["gptq", "awq"], "QuantConfig.setup: awq: expected a transform before any rounding, got it after gptq"),
        (["lapq", "awq"], "awq: expected a transform before any choice of ranges, got it after lapq"),
        (["gptq", "lapq"], "lapq: expected a choice of ranges before any rounding, got it after gptq"),
        (["gptq", "adaround"], "adaround: expected one rounding at most, got it after gptq"),
    ],
)
def test_unknown_names_are_refused_before_any_work(setup, match):
    with pytest.raises(ValueError, match=match):
        QuantController(QuantConfig.parse("ste", "w8a8", setup=setup))
    with pytest.raises(ValueError, match=match):
        QuantCallback("ste", "w8a8", setup=setup)


@pytest.mark.parametrize("setup", [[3], [{"alpha": 1}], [["awq"]]])
def test_entries_that_are_no_transforms(setup):
    with pytest.raises(ValueError, match="expected names, or mappings with a name"):
        QuantConfig.parse("ste", "w8a8", setup=setup)
    with pytest.raises(ValueError, match="expected 1 or more batches, got 0"):
        QuantConfig.parse("ste", "w8a8", setup_batches=0)


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["smoothquant,equalize"], ("smoothquant", "equalize")),
        (["smoothquant", "{name: equalize, relu6: true}"], ("smoothquant", {"name": "equalize", "relu6": True})),
        (["{name: smoothquant, alpha: search},awq"], ({"name": "smoothquant", "alpha": "search"}, "awq")),
    ],
)
def test_flags(words, want):
    (flags,) = HfArgumentParser(QuantArguments).parse_args_into_dataclasses(
        ["--quant", "ste", "--quant_setup_batches", "4", *(w for text in words for w in ("--quant_setup", text))]
    )
    config = flags.to_config()
    assert config.setup == want
    assert config.setup_batches == 4
    with pytest.raises(ValueError, match="--quant_setup: expected names of transforms"):
        QuantArguments(quant="ste", quant_setup=["{name: equalize"]).to_config()
    with pytest.raises(ValueError, match="Did you mean transform 'rotate'"):
        QuantArguments(quant="ste", quant_setup=["rotat"]).to_config()


def test_a_hand_written_loop_must_bring_data():
    controller = QuantController(QuantConfig.parse("ste", "w4a8-g32", setup="smoothquant"))
    with pytest.raises(ValueError, match=r"QuantConfig.setup: expected training data .* prepare\(model, batches="):
        controller.prepare(causal_lm())
    model = causal_lm()
    report = controller.prepare(model, batches=lambda: [token_batch()])
    assert len(report.setup.applied) == 9
    assert str(report).startswith("set-up: smoothquant: 9 sites, output changed by")


# ---- Lightning


def test_lightning_runs_them_once_and_takes_nothing_from_training(tmp_path):
    """The run is the one of a module transformed by hand, with data in the same order."""
    by_hand = module()
    batches = [Inputs((), {"tokens": rows}) for (rows,) in words()]
    assert smoothquant(by_hand, batches).applied
    for loader in (words, shuffled):
        runs = []
        for net, setup in ((module(), ["smoothquant"]), (module(), None)):
            if setup is None:
                net.load_state_dict(by_hand.state_dict())
            quant = QuantCallback("ste", "w4a8-g16", setup=setup)
            torch.manual_seed(1)
            fit = trainer(tmp_path, quant, max_epochs=2)
            fit.fit(net, loader())
            runs.append(net)
        assert runs[0].losses == runs[1].losses
        assert differing(runs[0].state_dict(), runs[1].state_dict()) == []
        plain = module()
        torch.manual_seed(1)
        trainer(tmp_path, QuantCallback("ste", "w4a8-g16"), max_epochs=2).fit(plain, loader())
        assert plain.losses != runs[0].losses


def test_lightning_resumes_with_the_checkpoint_s_weights(tmp_path):
    """A second set-up would move them; and what set-up changed beside weights is there again."""

    def net() -> L.LightningModule:
        out = module(Cnn)
        out.body[2] = nn.ReLU6()
        return out

    def quant() -> QuantCallback:
        return QuantCallback("ste", "w4a8-channel", setup=[{"name": "equalize", "relu6": True}, "smoothquant"])

    whole = net()
    trainer(tmp_path, quant(), max_epochs=2).fit(whole, images())
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, quant(), keep, max_epochs=1).fit(net(), images())
    path = tmp_path / "last.ckpt"
    resumed = net()
    trainer(tmp_path, quant(), max_epochs=2).fit(resumed, images(), ckpt_path=path)
    assert type(resumed.body[2]) is nn.ReLU
    assert differing(whole.state_dict(), resumed.state_dict()) == []
    # without a trainer, and in a stage without training data
    half = QuantCallback.load_from_checkpoint(Cnn, path)
    assert differing(half.state_dict(), torch.load(path, weights_only=True)["state_dict"]) == []
    tested, callback = net(), quant()
    tester = trainer(tmp_path, callback)
    tester.test(tested, images(), ckpt_path=path, verbose=False)
    assert type(tested.body[2]) is nn.ReLU
    assert callback.report.setup == "left to the run whose checkpoint is loaded"
    with pytest.raises(AttachError, match="Fit first; or build the module and the callback anew"):
        tester.fit(tested, images())
    other = QuantCallback("ste", "w4a8-channel")
    with pytest.raises(ValueError, match="state, setup: expected the checkpoint's"):
        trainer(tmp_path, other, max_epochs=2).fit(net(), images(), ckpt_path=path)


def test_lightning_part_of_a_module(tmp_path):
    """Only what lies in the part, whose own inputs are seen."""

    class Two(Cnn):
        def training_step(self, batch, batch_idx):
            z = self.head(self.body(batch[0]))
            return nn.functional.cross_entropy(z, batch[1])

    net = module(Two)
    quant = QuantCallback("ste", "w8a16", setup=["equalize"], module="body")
    trainer(tmp_path, quant, max_epochs=1).fit(net, images())
    assert [a.producer for a in quant.report.setup.applied] == ["1"]


class Late(Words):
    """Makes its data in ``setup``, which comes after the callbacks'."""

    def setup(self, stage: str) -> None:
        self.rows = words().dataset

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=8)


class Apart(Cnn):
    """Calls its layers one by one."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])


@pytest.mark.parametrize(
    ("kind", "data", "match"),
    [
        (Late, None, "expected training data before setup, got AttributeError.*LightningDataModule"),
        (Apart, images, r"Apart.training_step: expected one module that holds all layers .* got none of Apart called"),
    ],
)
def test_lightning_says_what_it_cannot_see(tmp_path, kind, data, match):
    quant = QuantCallback("ste", "w8a16", setup=["smoothquant"])
    with pytest.raises(AttachError, match=match):
        trainer(tmp_path, quant).fit(module(kind), data and data())


def test_lightning_datamodule_and_manual_optimization(tmp_path):
    class Data(L.LightningDataModule):
        def setup(self, stage: str) -> None:
            self.rows = words().dataset

        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.rows, batch_size=8)

    class Manual(Words):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    net, quant = module(Manual), QuantCallback("ste", "w4a8-g16", setup=["smoothquant"])
    trainer(tmp_path, quant, max_epochs=1).fit(net, datamodule=Data())
    assert len(quant.report.setup.applied) >= 2
    assert len(net.losses) == 4  # none of them from looking


# ---- transformers


def hf(
    root: Path, setup: object = (), model: nn.Module | None = None, rows: object = None, **settings: object
) -> QuantTrainer:
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    args = TrainingArguments(str(root / "run"), **{"max_steps": 4, **defaults, **settings})
    config = QuantConfig.parse("ste", "w4a8-g32", setup=setup, setup_batches=100)
    return QuantTrainer(
        model=model or causal_lm(),
        args=args,
        train_dataset=rows or Dataset.from_list(token_rows(32)),
        data_collator=default_data_collator,
        quant=config,
    )


def losses(trained: QuantTrainer) -> list[float]:
    return [e["loss"] for e in trained.state.log_history if "loss" in e]


def test_trainer_runs_them_once_and_takes_nothing_from_training(tmp_path, capsys):
    model = causal_lm()
    rows = torch.tensor([r["input_ids"] for r in token_rows(32)])
    smoothquant(model, [{"input_ids": part} for part in rows.split(4)])
    runs = [hf(tmp_path / "a", ["smoothquant"]), hf(tmp_path / "b", model=model), hf(tmp_path / "c")]
    assert "set-up: smoothquant: 9 sites, output changed by" in capsys.readouterr().out
    for trained in runs:
        trained.train()
    one, two, plain = map(losses, runs)
    assert one == two
    assert one != plain
    assert differing(runs[0].model.state_dict(), runs[1].model.state_dict()) == []


def test_trainer_resumes_with_the_checkpoint_s_weights(tmp_path):
    setup = ["rotate", {"name": "awq", "points": 4}]
    whole = hf(tmp_path / "whole", setup)
    whole.train()
    first = hf(tmp_path / "half", setup, save_strategy="steps", save_steps=2)
    first.train()
    resumed = hf(tmp_path / "half", setup)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "run" / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert differing(whole.model.state_dict(), resumed.model.state_dict()) == []
    loaded = load_training_checkpoint(tmp_path / "half" / "run" / "checkpoint-4")
    assert differing(loaded.state_dict(), whole.model.state_dict()) == []


def test_trainer_with_model_init(tmp_path):
    config = QuantConfig.parse("ste", "w4a8-g32", setup=["smoothquant"])
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    made = QuantTrainer(
        model_init=lambda: causal_lm(),  # its own arguments are no trial
        args=args,
        train_dataset=Dataset.from_list(token_rows(8)),
        data_collator=default_data_collator,
        quant=config,
    )
    made.train()  # builds the model anew
    assert len(made.quant_report.setup.applied) == 9


def test_trainer_with_a_stream(tmp_path):
    rows = Dataset.from_list(token_rows(32)).to_iterable_dataset()
    made = hf(tmp_path, ["smoothquant"], rows=rows, max_steps=2)
    made.train()
    assert len(made.quant_report.setup.applied) == 9


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks transformers for it
def test_adapters_come_after(tmp_path):
    model = get_peft_model(causal_lm(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(AttachError, match=r"a model without adapters.*before get_peft_model"):
        hf(tmp_path, ["smoothquant"], model)
    smoothed = causal_lm()
    smoothquant(smoothed, [token_batch()])
    hf(tmp_path, (), get_peft_model(smoothed, LoraConfig(r=4, target_modules=["q_proj"]))).train()


def test_scripts_of_others_and_trainers_without_data(tmp_path):
    """As ``hf-quant`` does it: a plain Trainer, made quantized while it is built."""
    flags = QuantArguments(quant="ste", quant_scheme="w4a8-g32", quant_setup=["smoothquant,{name: rotate}"])
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    data = {"train_dataset": Dataset.from_list(token_rows(16)), "data_collator": default_data_collator}
    with quantized_trainers(flags):
        made = Trainer(causal_lm(), args, **data)
        assert [a.what for a in made.quant_report.setup.applied] == ["smoothquant"] * 9 + ["rotate"] * 3
        made.train()
        with pytest.raises(
            AttachError, match=r"QuantConfig.setup: expected training data to look at, got no train_data"
        ):
            Trainer(causal_lm(), args)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_lightning_cli(tmp_path, monkeypatch):
    callback = {
        "class_path": "lightning_quant.QuantCallback",
        "init_args": {"method": "ste", "scheme": "w8a8", "setup": BOTH},
    }
    settings = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": [callback]}
    model = {"class_path": "tests.integration.modules.Cnn"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model, "trainer": settings}))
    monkeypatch.setattr("sys.argv", ["run.py", "--config", str(tmp_path / "run.yaml")])
    cli = LightningCLI(run=False, seed_everything_default=0, save_config_callback=None)
    (quant,) = (c for c in cli.trainer.callbacks if isinstance(c, QuantCallback))
    assert quant.config.setup == tuple(BOTH)
    cli.trainer.fit(cli.model, images())
    assert quant.report.setup.applied


def test_weights_must_be_whole_and_here():
    model = causal_lm()
    model.lm_head.weight.ds_id = 0  # what ZeRO-3 marks its parts with
    with pytest.raises(AttachError, match=r"lm_head: expected whole weights on every rank, got .* ZeRO-3"):
        refuse_unfit(model)
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(AttachError, match="weights with values, got the meta device"):
        refuse_unfit(model)
    with pytest.raises(ValueError, match="at least one batch"):
        set_up(causal_lm(), QuantConfig.parse("ste", "w4a8-g32", setup="awq"), [])


def test_a_step_that_fails_says_so():
    model = nn.Sequential(nn.Linear(2, 2))

    def step() -> None:
        raise KeyError("scores")

    with pytest.raises(AttachError, match=r"mine: expected a step that reaches the model .* got KeyError: 'scores'"):
        first_call(model, step, "mine")
    found = first_call(model, lambda: model(torch.ones(1, 2)) / 0, "mine")
    assert torch.equal(found.args[0], torch.ones(1, 2))


# ---- many ranks


@pytest.mark.parametrize("rounding", [(), ("--rounding",)], ids=["transforms", "rounding"])
@pytest.mark.parametrize("front", [(), ("--trainer",)], ids=["lightning", "trainer"])
def test_every_rank_ends_with_the_same_weights(tmp_path, front, rounding):
    run("setup_run.py", "--out", tmp_path, *front, *rounding, processes=2)
    ranks = [result(tmp_path, r) for r in (0, 1)]
    assert differing(ranks[0], ranks[1]) == []
    torch.manual_seed(0)
    start = causal_lm().state_dict() if front else Words().state_dict()
    assert any(not torch.equal(start[name], ranks[0][name]) for name in start)
