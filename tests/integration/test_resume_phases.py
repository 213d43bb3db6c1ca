"""A run that stops in the middle of an epoch, in any phase, and goes on in new objects ends with the same bits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L  # noqa: N812
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments, default_data_collator

from hf_integration import QuantTrainer
from lightning_quant import QuantCallback, QuantConfig
from lightning_quant.attach import quantizers
from tests.integration.modules import QUIET, Cnn, images, trainer
from tests.integration.processes import differing, result, run
from tests.integration.tiny import causal_lm, token_rows

pytestmark = QUIET

EPOCHS, STEPS = 3, 24
LAM = {"curve": "cosine", "end": 0.1, "delay": 0.25, "until": 0.75}  # steps 6 to 18


class Setting(NamedTuple):
    """What a run is made of."""

    method: str = "pege"
    theta: str | None = None
    delay: float = 0
    batch_norm: str = "keep"

    def __str__(self) -> str:
        return "-".join(str(word) for word in self if word)

    def callback(self) -> QuantCallback:
        options: dict[str, Any] = {"freeze_batch_norm": 0.75, "batch_norm": self.batch_norm}
        if self.method == "pege":
            options |= {"lam": LAM, **({"theta": self.theta} if self.theta else {})}
        return QuantCallback(self.method, "w4a8", calibration=5, delay=self.delay, options=options)


class Rows(DataLoader):
    """Goes on behind the batch at which a checkpoint was written, as torchdata's StatefulDataLoader does."""

    done = skip = 0

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0
        for self.done, batch in enumerate(super().__iter__(), 1):
            if self.done > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["done"]


def rows() -> Rows:
    return Rows(images(rows=8 * STEPS // EPOCHS).dataset, batch_size=8)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Everything the next step's forward depends on, weights, statistics, ranges and flags."""
    found = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return found | {f"{path}.ready": torch.tensor(q.ready) for path, q in quantizers(module)}


class Look(L.Callback):
    """Notes the state when a resumed run begins, and when it has done ``step`` steps, where it may stop."""

    def __init__(self, step: int, stop: bool = False) -> None:
        self.step, self.stop = step, stop
        self.first: dict[str, torch.Tensor] = {}
        self.then: dict[str, torch.Tensor] = {}
        self.phase: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first = state(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        if trainer.global_step != self.step:
            return
        (quant,) = (c for c in trainer.callbacks if isinstance(c, QuantCallback))
        self.then = state(pl_module)
        self.phase = {
            "observing": any(q.observing for _, q in quantizers(pl_module)),
            "float": self.step < quant.controller.start,
            "lam": quant.controller.values().get("lam"),
            "norms": any(m.training for p, m in pl_module.named_modules() if p in ("body.1", "body.4")),
        }
        trainer.should_stop = self.stop


@cache
def uninterrupted(setting: Setting) -> tuple[dict[str, torch.Tensor], list[float]]:
    """State and losses of the run that nothing stops."""
    torch.manual_seed(0)
    module = Cnn()
    trainer(Path("."), setting.callback(), max_epochs=EPOCHS).fit(module, rows())
    assert len(module.losses) == STEPS
    return state(module), module.losses


PHASES = {
    "calibration": (3, {"observing": True, "norms": True}),
    "ramp": (11, {"observing": False, "norms": True}),
    "settled": (21, {"observing": False, "norms": False}),
}
SETTINGS = [Setting("pege", "group"), Setting("pege", "element"), Setting("lsq"), Setting("dsq")]
RUNS = [(setting, phase) for setting in SETTINGS for phase in PHASES]
RUNS += [(Setting("lsq", batch_norm=kind), phase) for kind in ("two_pass", "frozen") for phase in PHASES]


def check(root: Path, setting: Setting, step: int, expected: dict[str, Any]) -> dict[str, Any]:
    """Stop after so many steps in a phase that looks as expected, resume, compare; what the phase looked like."""
    torch.manual_seed(0)
    cut, look = Cnn(), Look(step, stop=True)
    save = ModelCheckpoint(root, filename="cut", every_n_train_steps=step)
    trainer(root, setting.callback(), look, save, max_epochs=EPOCHS).fit(cut, rows())
    assert len(cut.losses) == step
    assert step % (STEPS // EPOCHS)  # in the middle of an epoch
    assert {name: look.phase[name] for name in expected} == expected

    torch.manual_seed(1)
    rest, again = Cnn(), Look(step)
    trainer(root, setting.callback(), again, max_epochs=EPOCHS).fit(rest, rows(), ckpt_path=root / "cut.ckpt")
    assert differing(look.then, again.first) == []
    whole, losses = uninterrupted(setting)
    assert cut.losses + rest.losses == losses
    assert differing(whole, state(rest)) == []
    assert differing(look.then, whole) != []
    return look.phase


@pytest.mark.parametrize(("setting", "phase"), RUNS, ids=str)
def test_lightning(tmp_path, setting, phase):
    step, expected = PHASES[phase]
    found = check(tmp_path, setting, step, expected)
    if setting.method == "pege":
        lam = found["lam"]
        assert {"calibration": lam == 0, "ramp": 0 < lam < 0.1, "settled": lam == 0.1}[phase]


@pytest.mark.parametrize(("step", "expected"), [(4, {"float": True}), (9, {"float": False, "observing": True})])
def test_lightning_with_a_delay(tmp_path, step, expected):
    check(tmp_path, Setting("pege", delay=0.25), step, expected)  # float for 6 steps, ranges follow until 11


# transformers' Trainer


class Stop(TrainerCallback):
    """Saves and stops."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: Any, control: Any, **kwargs: object) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def quant_trainer(root: Path, *callbacks: TrainerCallback) -> QuantTrainer:
    return QuantTrainer(
        model=causal_lm(),
        args=TrainingArguments(
            output_dir=str(root),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=Dataset.from_list(token_rows(24)),
        data_collator=default_data_collator,
        callbacks=list(callbacks),
        quant=QuantConfig.parse("pege", "w4a8-static-g32", calibration=5, lam=LAM),
    )


@pytest.mark.parametrize("step", [4, 8, 11])  # calibration, ramp, settled: of 12, in the middle of an epoch of 6
def test_trainer(tmp_path, step):
    whole = quant_trainer(tmp_path / "whole")
    whole.train()
    cut = quant_trainer(tmp_path / "cut", Stop(step))
    cut.train()
    assert cut.state.global_step == step
    then = state(cut.model)
    rest = quant_trainer(tmp_path / "cut")
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 12
    assert differing(state(whole.model), state(rest.model)) == []
    assert differing(then, state(rest.model)) != []


# A directory checkpoint, of which each process wrote its part


def test_sharded_checkpoint(tmp_path):
    args = ("--strategy", "fsdp2", "--sharded", "--scheme", "w4a8-static-g32", "--epochs", 2, "--calibration", 12)
    run("lightning_run.py", "--out", tmp_path / "whole", *args, processes=2)
    path = tmp_path / "whole" / "ckpt" / "epoch=0.ckpt"
    assert len(list(path.glob("*.distcp"))) == 2
    run("lightning_run.py", "--out", tmp_path / "rest", *args, "--resume-from", path, processes=2)
    for rank in (0, 1):
        whole, rest = result(tmp_path / "whole", rank), result(tmp_path / "rest", rank)
        then, again = whole["noted"][8], rest["noted"][8]
        assert differing(then, again) == []
        flags = [bool(value) for name, value in again.items() if name.endswith(".ready")]
        assert flags == [True] * 6
        assert all(bool(value.any()) for name, value in again.items() if name.endswith(".running"))
        assert rest["losses"] == whole["losses"][8:]
        assert differing(whole["state"], rest["state"]) == []
        assert differing({name: whole["noted"][16][name] for name in then}, then) != []
