"""Metrics in the frameworks' own loggers: names, cadence, several processes."""

from __future__ import annotations

import csv
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from tensorboardX.proto.event_pb2 import Event

from hf_integration import QuantArguments
from lightning_quant import QuantCallback
from tests.integration.modules import QUIET, Cnn, Words, images, trainer, words
from tests.integration.processes import run
from tests.integration.test_trainer import make

pytestmark = QUIET

LAYERS = {"body.0", "body.3", "head"}
MEASURED = {"error", "clip", "scale"}
MEANS = {f"quant/{name}" for name in ("error", "clip", "flips", "scale_drift", "input_error", "input_clip")}
FLOATS = {"quant/lam", "quant/sharpness", "quant/theta", "quant/theta_max", "quant/progressive_loss"}


def csv_rows(root: Path) -> list[dict[str, float]]:
    """What was logged, by row, without empty cells."""
    with next(root.rglob("metrics.csv")).open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def events(root: Path) -> dict[str, dict[int, float]]:
    """Scalars of a TensorBoard event file by tag and step; a record is length, checksum, event, checksum."""
    (file,) = root.rglob("events.out.tfevents.*")
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


class Run:
    """What Weights & Biases calls a run, as far as its logger in Lightning uses one."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []

    def log(self, data: dict[str, Any]) -> None:
        assert all(isinstance(key, str) and isinstance(value, (int, float)) for key, value in data.items())
        self.history.append(data)


class Wandb(Logger):
    """Lightning's WandbLogger without its service: one dict a call, the step among its values."""

    name, version = "run", "0"

    def __init__(self) -> None:
        super().__init__()
        self._run = Run()

    @property
    @rank_zero_experiment
    def experiment(self) -> Run:
        return self._run

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics, **{"trainer/global_step": step}))


def layer_names(layers: set[str] = LAYERS) -> set[str]:
    """Names of the layers' own metrics with the defaults, at the first step after calibration."""
    state = {"theta", "theta_max", "progressive_loss"}
    weight = {f"quant/{path}/weight_{name}" for path in layers for name in {*MEASURED, *state, "flips"}}
    return weight | {f"quant/{path}/input_{name}" for path in layers for name in MEASURED | state}


def test_csv_gets_means_and_layers_each_at_their_own_steps(tmp_path):
    quant = QuantCallback(log_every_n_steps=4, log_layers_every_n_steps=6, options={"calibration": 2})
    trainer(tmp_path, quant, logger=CSVLogger(tmp_path)).fit(Cnn(lr=0.01), images(), images(seed=1))
    rows = {int(r["step"]): r for r in csv_rows(tmp_path) if "quant/error" in r}
    assert sorted(rows) == [3, 5, 7, 11, 15]
    for step, row in rows.items():
        names = {k for k in row if k.startswith("quant/")}
        layers = {k for k in names if k.count("/") == 2}
        assert names - layers == (MEANS | FLOATS) - {"quant/scale_drift"} | {"quant/input_scale_drift"}, step
        learned = {f"quant/{path}/input_scale_drift" for path in LAYERS}  # 8-bit weights' scales follow the weights
        assert layers == (layer_names() | learned if step in (5, 11) else set()), step
        assert all(map(math.isfinite, row.values()))
        assert 0 < row["quant/flips"] < 1
        assert 0 <= row["quant/clip"] < 0.1
    row = rows[11]
    assert row["quant/error"] == pytest.approx(sum(row[f"quant/{p}/weight_error"] for p in LAYERS) / 3)
    assert row["quant/input_scale_drift"] > rows[5]["quant/input_scale_drift"] >= 0


def test_layers_alone_and_nothing_without_a_logger(tmp_path):
    every = {"log_every_n_steps": 0, "log_layers_every_n_steps": 8}
    trainer(tmp_path, QuantCallback(**every), logger=CSVLogger(tmp_path)).fit(Cnn(), images())
    assert [int(r["step"]) for r in csv_rows(tmp_path)] == [7, 15]
    quant = QuantCallback(log_every_n_steps=1, log_layers_every_n_steps=1)
    module = Cnn()
    trainer(tmp_path, quant, max_epochs=1).fit(module, images())
    assert not any(q.measured for q in quant.controller._quantizers)


@pytest.mark.parametrize("name", ["log_every_n_steps", "log_layers_every_n_steps"])
def test_negative_intervals_are_refused(name):
    with pytest.raises(ValueError, match=rf"QuantCallback\.{name}: expected 0 or more steps, got -1\. Use 0"):
        QuantCallback(**{name: -1})


def test_tensorboard_and_a_logger_shaped_as_wandb_get_the_same(tmp_path):
    wandb = Wandb()
    runner = trainer(
        tmp_path,
        QuantCallback(log_layers_every_n_steps=8, options={"calibration": 2}),
        logger=[TensorBoardLogger(tmp_path), wandb],
        log_every_n_steps=4,
    )
    runner.fit(Cnn(lr=0.01), images())
    scalars = events(tmp_path)
    entries = [entry for entry in wandb.experiment.history if "quant/error" in entry]
    assert [e["trainer/global_step"] for e in entries] == [3, 7, 11, 15]
    for entry in entries:
        step = entry.pop("trainer/global_step")
        assert ("quant/body.3/weight_flips" in entry) == (step in (7, 15))
        for name, value in entry.items():
            assert scalars[name][step] == pytest.approx(value, rel=1e-6), name
    assert layer_names() <= set(scalars)
    assert MEANS - {"quant/scale_drift"} <= set(scalars)


def test_accumulation_and_recomputed_blocks_log_once_per_optimizer_step(tmp_path):
    """The last micro-batch's forward is what is measured, and the update after all of them what flips."""
    module = Words(recompute=True)
    quant = QuantCallback("lsq", "w4a8-g16", rules=[{"match": "head", "weight": None}], log_layers_every_n_steps=2)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 2}
    trainer(tmp_path, quant, logger=CSVLogger(tmp_path), **settings).fit(module, words())
    rows = [r for r in csv_rows(tmp_path) if "quant/error" in r]
    assert [int(r["step"]) for r in rows] == [1, 3]
    for row in rows:
        flips = [row[f"quant/blocks.{i}.{name}/weight_flips"] for i in (0, 1) for name in ("query", "up", "down")]
        assert all(0 < share < 1 for share in flips)
    assert rows[1]["quant/scale_drift"] > 0


class Twice(Cnn):
    """Two optimizers step in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.body, self.head)]


def test_flips_of_a_batch_in_which_two_optimizers_step_are_those_of_both(tmp_path):
    quant = QuantCallback("ste", "w8a16", log_layers_every_n_steps=4)
    trainer(tmp_path, quant, logger=CSVLogger(tmp_path), max_epochs=1, log_every_n_steps=4).fit(Twice(), images())
    (row,) = (r for r in csv_rows(tmp_path) if "quant/flips" in r)
    assert all(row[f"quant/{path}/weight_flips"] > 0 for path in LAYERS)


def test_trainer_logs_layers_at_its_own_logging_steps(tmp_path):
    quant = QuantArguments(quant="pege", quant_scheme="w4a8-static-g32", quant_calibration=2, quant_log_layers=4)
    runner = make(tmp_path, quant, logging_steps=3, max_steps=12)
    runner.train()
    entries = {e["step"]: e for e in runner.state.log_history if "loss" in e}
    assert sorted(entries) == [3, 6, 9, 12]
    for step, entry in entries.items():
        layers = {k for k in entry if "/" in k}
        assert bool(layers) == (step in (6, 9, 12))  # the first to come at or after 4, 8, 12
        assert 0 < entry["quant_flips"] < 1
        assert all(math.isfinite(v) for v in entry.values())
    path = "quant_model.layers.0.mlp.down_proj"
    for name in ("weight_flips", "weight_clip", "weight_scale_drift", "input_clip", "input_scale"):
        assert 0 <= entries[6][f"{path}/{name}"] < 1
    with pytest.raises(ValueError, match=r"--quant_log_layers: expected 0 or more steps, got -1\. Use 0 for never"):
        QuantArguments(quant_log_layers=-1).to_config()


ARGUMENTS = ("--epochs", 1, "--double", "--metrics")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every metric of a run on one process."""
    out = tmp_path_factory.mktemp("one")
    run("lightning_run.py", "--out", out, *ARGUMENTS)
    return csv_rows(out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_report_what_one_does(tmp_path, alone, strategy):
    """Weights are the same on all ranks, whole or gathered; a logger on rank 0 alone keeps no rank waiting."""
    run("lightning_run.py", "--out", tmp_path, *ARGUMENTS, "--strategy", strategy, processes=2)
    rows = csv_rows(tmp_path)
    assert len(rows) == len(alone) == 8
    assert {"quant/body.0/weight_flips", "quant/theta_max", "quant/clip", "quant/head/weight_scale"} <= set(alone[0])
    for mine, theirs in zip(rows, alone, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            part = strategy == "fsdp2" and name.endswith("drift")  # of rank 0's scales
            assert mine[name] == pytest.approx(value, rel=0.5 if part else 1e-5, abs=1e-9), name
    assert alone[-1]["quant/scale_drift"] > 0
    assert alone[-1]["quant/flips"] > 0
