"""QuantCallback inside a real lightning Trainer."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant import CoverageError, LayerRule, QuantCallback, QuantConfig, TensorSpec
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import AttachError
from lightning_quant.quantizer import FakeQuantizer
from tests.integration.modules import QUIET, Cnn, Mlp, Words, hard_output, images, learned, trainer, words

pytestmark = QUIET


# Defaults, on ordinary modules


def test_defaults_on_a_cnn_with_batch_norm(tmp_path):
    module, quant = Cnn(), QuantCallback()
    trainer(tmp_path, quant, max_epochs=10).fit(module, images(), images(seed=1))
    assert sum(module.losses[-4:]) < 0.5 * sum(module.losses[:4])
    assert {p for p, _ in quant_layers(module)} == {"body.0", "body.3", "head"}
    assert quant.config.method == "pege"
    assert quant.report.coverage > 0.9
    for path, layer in quant_layers(module):
        assert layer.weight_quant.spec.bits == layer.input_quant.spec.bits == 8, path
        assert layer.input_quant.ready, path
        assert layer.weight_quant.theta.any(), path


# Checkpoints, and Lightning's other callbacks


def test_state_dict_keys(tmp_path):
    module, born = Cnn(), set(Cnn().state_dict())
    save = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, QuantCallback(), save, max_epochs=1).fit(module, images())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    keys = set(saved["state_dict"])
    assert born < keys
    paths = {p for p, _ in quantizers(module)}
    assert {k.rsplit(".", 1)[0] for k in keys - born} == paths
    assert saved["callbacks"]["QuantCallback"]["config"]["method"] == "pege"
    plain = Cnn()
    plain.load_state_dict({k: v for k, v in saved["state_dict"].items() if k in born})
    assert torch.equal(plain.head.weight, module.head.weight)
    before = Cnn()
    trainer(tmp_path, QuantCallback(), max_epochs=1).test(before, images(), verbose=False)
    assert set(before.state_dict()) == keys


@pytest.mark.parametrize("method", ["lsq", "pege"])
def test_together_with_weight_averaging(tmp_path, method):
    module = Cnn()
    quant, average = QuantCallback(method, "w4a8"), EMAWeightAveraging(decay=0.5)
    trainer(tmp_path, quant, average, max_epochs=3).fit(module, images(), images(seed=1))
    assert module.losses[-1] < module.losses[0]
    assert all(q.ready and bool((q.scale > 0).all()) for _, q in quantizers(module))
    averaged = average._average_model.module
    assert torch.equal(averaged.head.weight_quant.scale, module.head.weight_quant.scale)


def test_weight_averaging_that_copied_the_float_module_is_refused(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    module = Cnn()
    with pytest.raises(ValueError, match=r"EMAWeightAveraging: expected .* after QuantCallback.* Put QuantCallback"):
        trainer(tmp_path, average, QuantCallback()).fit(module, images())
    assert module.losses == []


def test_export_of_a_plain_module_is_what_it_computes(tmp_path):
    module, quant = Cnn(), QuantCallback("pege", "w4a16")
    trainer(tmp_path, quant).fit(module, images())
    assert quant.export(module, tmp_path / "out").format == "folded"
    plain = Cnn()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = next(iter(images()))[0]
    assert torch.equal(hard_output(plain, x), hard_output(module, x))


# Logging


def logged(root: Path) -> list[dict[str, str]]:
    with next(root.rglob("metrics.csv")).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("method", "names"), [("pege", {"lam", "progressive_loss", "theta"}), ("dsq", {"alpha"})])
def test_metrics_arrive_when_the_trainer_logs_and_only_then_is_anything_measured(tmp_path, monkeypatch, method, names):
    quant, measured = QuantCallback(method, "w4a8-static"), []
    real = FakeQuantizer._measure

    def measure(self, *args):
        measured.append(quant.controller.step)
        return real(self, *args)

    monkeypatch.setattr(FakeQuantizer, "_measure", measure)
    module = Cnn(lr=0.01)
    runner = trainer(tmp_path, quant, logger=CSVLogger(tmp_path), log_every_n_steps=5)
    runner.fit(module, images(), images(seed=1))
    rows = [r for r in logged(tmp_path) if r["quant/error"]]
    assert [int(r["step"]) for r in rows] == [4, 9, 14]
    assert sorted(set(measured)) == [4, 9, 14]
    assert len(measured) == 3 * len(list(quantizers(module)))
    for row in rows:
        assert 0 < float(row["quant/error"]) < 0.1
        assert 0 < float(row["quant/input_error"]) < 0.1
        assert all(math.isfinite(float(row[f"quant/{name}"])) for name in names)
        for name, value in quant.controller.values(int(row["step"])).items():
            assert float(row[f"quant/{name}"]) == pytest.approx(value)
    if method == "pege":
        assert float(rows[-1]["quant/lam"]) > float(rows[0]["quant/lam"]) == 0
        assert float(rows[-1]["quant/progressive_loss"]) > 0


@pytest.mark.parametrize("every", [0, 3])
def test_own_logging_interval(tmp_path, every):
    quant = QuantCallback(log_every_n_steps=every)
    trainer(tmp_path, quant, logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1).fit(
        Cnn(), images(), images()
    )
    steps = [int(r["step"]) for r in logged(tmp_path) if r.get("quant/error")]
    assert steps == ([] if every == 0 else [2])


# Lightning's own features


def after_one_epoch(root: Path, accumulate: int, lam: float, scheme: str = "w4a8-g32") -> Mlp:
    torch.manual_seed(0)
    module = Mlp(lr=0.1)
    quant = QuantCallback("pege", scheme, options={"lam": lam, "calibration": 1})
    trainer(root, quant, max_epochs=1, accumulate_grad_batches=accumulate).fit(
        module, images(rows=16, batch=8 // accumulate)
    )
    return module


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_gives_the_big_batch_s_update(tmp_path, accumulate):
    whole, parts = after_one_epoch(tmp_path, 1, 0.05), after_one_epoch(tmp_path, accumulate, 0.05)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    without = after_one_epoch(tmp_path, 1, 0.0)
    gap = (whole.head.weight - without.head.weight).abs().max()
    assert gap > 1e-4  # the progressive term is large enough for the comparison to mean something


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16(tmp_path, precision):
    module = Words()
    trainer(tmp_path, QuantCallback("pege", "w4a8-static-g8"), max_epochs=8, precision=precision).fit(module, words())
    assert sum(module.losses[-4:]) < 0.9 * sum(module.losses[:4])
    wanted = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {p.dtype for p in learned(module)} == {wanted}
    assert all(bool(torch.isfinite(p).all()) for p in learned(module))


class Late(Cnn):
    """Layers are made in configure_model, as large models do it."""

    def __init__(self, eager: bool = False, careless: bool = False) -> None:
        super().__init__()
        self.careless = careless
        self.late_head = None
        if not eager:
            self.body = self.head = None

    def configure_model(self) -> None:
        if self.body is None or self.careless:
            ready = Cnn()
            self.body, self.head = ready.body, ready.head
        if self.late_head is None:
            self.late_head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late_head(self.head(self.body(x)))


def test_layers_made_in_configure_model(tmp_path):
    module = Late()
    save = ModelCheckpoint(tmp_path, filename="last")
    trainer(tmp_path, QuantCallback(), save).fit(module, images())
    assert {p for p, _ in quant_layers(module)} == {"body.0", "body.3", "head", "late_head"}
    x = next(iter(images()))[0]
    other = Late()
    found = trainer(tmp_path, QuantCallback()).predict(other, images(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(found[0], hard_output(module, x))


@pytest.mark.parametrize(("settings", "where"), [({"eager": True}, "late_head"), ({"careless": True}, "body.0")])
def test_layers_that_come_after_attaching_are_not_left_in_float_silently(tmp_path, settings, where):
    module = Late(**settings)
    with pytest.raises(AttachError, match=rf"{where}: expected every layer to exist .* made later\. Make all layers"):
        trainer(tmp_path, QuantCallback()).fit(module, images())
    assert module.losses == []


class Adversarial(Cnn):
    """Two optimizers under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rival = nn.Linear(4, 4)
        self.seen: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.seen.append(float(self.head.weight_quant.lam))
        first, second = self.optimizers()
        for optimizer, sign in ((first, 1.0), (second, -1.0)):
            loss = sign * nn.functional.cross_entropy(self.rival(self(batch[0])).tanh(), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        mine = [*self.body.parameters(), *self.head.parameters()]
        return [torch.optim.AdamW(mine, 1e-3), torch.optim.AdamW(self.rival.parameters(), 1e-3)]


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 32}])
def test_manual_optimization_with_two_optimizers(tmp_path, limit):
    module = Adversarial()
    quant = QuantCallback(options={"lam": {"curve": "linear", "start": 0.0, "end": 1.0}})
    runner = trainer(tmp_path, quant, logger=CSVLogger(tmp_path), log_every_n_steps=5, **limit)
    runner.fit(module, images())
    assert runner.global_step == 32
    assert module.seen == pytest.approx([i / 16 for i in range(16)])
    assert [int(r["step"]) for r in logged(tmp_path) if r.get("quant/error")] == [4, 9, 14]
    groups = [g for o in runner.optimizers for g in o.param_groups if g.get("quantizer")]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in learned(module))
    assert module.rival.input_quant.ready


def test_weight_decay_is_not_for_quantizers(tmp_path):
    module = Cnn(weight_decay=0.3)
    runner = trainer(tmp_path, QuantCallback("lsq", "w4a8"), max_epochs=1)
    runner.fit(module, images())
    groups = runner.optimizers[0].param_groups
    mine = {id(p) for p in learned(module)}
    assert mine
    for group in groups:
        members = {id(p) for p in group["params"]}
        assert members <= mine or not members & mine
        assert group["weight_decay"] == (0.0 if members & mine else 0.3)
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in module.parameters())


class Careless(Cnn):
    """Lists its parameters in the constructor, before any callback has run."""

    def __init__(self) -> None:
        super().__init__()
        self.mine = list(self.parameters())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.mine, lr=1e-3)


def test_optimizer_without_the_quantizers_parameters_gets_them(tmp_path):
    module = Careless()
    runner = trainer(tmp_path, QuantCallback("lsq", "w4a8"), max_epochs=1)
    scales = None

    class Note(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            nonlocal scales
            scales = [q.scale.clone() for _, q in quantizers(pl_module) if q.is_weight]

    runner.callbacks.append(Note())
    runner.fit(module, images())
    _, added = runner.optimizers[0].param_groups
    assert {id(p) for p in added["params"]} == {id(p) for p in learned(module)}
    assert (added["lr"], added["weight_decay"]) == (1e-4, 0.0)
    now = [q.scale for _, q in quantizers(module) if q.is_weight]
    assert not any(torch.equal(a, b) for a, b in zip(scales, now, strict=True))


class Endless(IterableDataset):
    """No length."""

    def __iter__(self):
        while True:
            yield torch.zeros(1, 8, 8), 0


def test_endless_run_is_refused_before_the_first_step(tmp_path):
    module = Cnn()
    with pytest.raises(
        ValueError, match=r"expected the number of optimizer steps of the run, got None\. Set max_steps"
    ):
        trainer(tmp_path, QuantCallback(), max_epochs=-1).fit(module, images())
    with pytest.raises(ValueError, match="Set max_steps"):
        trainer(tmp_path, QuantCallback(), max_epochs=1).fit(module, DataLoader(Endless(), batch_size=2))
    assert module.losses == []


def test_methods_without_a_moving_schedule_run_endlessly(tmp_path):
    class Enough(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            trainer.should_stop = trainer.global_step == 3

    module = Cnn()
    trainer(tmp_path, QuantCallback("lsq"), Enough(), max_epochs=-1).fit(module, DataLoader(Endless(), batch_size=2))
    assert len(module.losses) == 3


class Unused(Cnn):
    """Holds a layer that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def test_layer_that_is_never_called(tmp_path):
    module = Unused()
    message = r"spare\.\w+_quant: expected every quantizer to be called by a training batch, got 2 never .*LayerRule"
    with pytest.raises(CoverageError, match=message):
        trainer(tmp_path, QuantCallback()).fit(module, images())
    assert len(module.losses) == 1
    cured = Unused()
    trainer(tmp_path, QuantCallback(rules=[{"match": "spare", "weight": None}])).fit(cured, images())
    with pytest.raises(CoverageError, match="evaluation batch"):
        trainer(tmp_path, QuantCallback()).predict(Unused(), images())


def test_gradient_checkpointing_observes_the_same_ranges(tmp_path):
    nets = []
    for recompute in (False, True):
        torch.manual_seed(0)
        nets.append(Words(recompute))
        trainer(tmp_path, QuantCallback("pege", "w4a8-static-g8"), max_epochs=2).fit(nets[-1], words())
    for name, value in nets[0].state_dict().items():
        assert torch.equal(nets[1].state_dict()[name], value), name
    assert nets[0].losses == nets[1].losses
    ready = [q.running.any() for _, q in quantizers(nets[1]) if not q.is_weight]
    assert len(ready) == 13
    assert all(ready)


class Traceable(Mlp):
    """No float() in the step, so that one graph holds it."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: dict[str, torch.Tensor], batch: object, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


# torch's tracer itself does what this is about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_module_trains_in_one_graph(tmp_path):
    plain, compiled = Traceable(lr=0.1), Traceable(lr=0.1)
    compiled.load_state_dict(plain.state_dict())
    trainer(tmp_path, QuantCallback(), max_epochs=2).fit(plain, images())
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    trainer(tmp_path, QuantCallback(), max_epochs=2).fit(torch.compile(compiled, backend=graphs), images())
    assert graphs.frame_count == 1
    assert len(compiled.losses) == 8
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-3)
    assert compiled.losses[-1] < compiled.losses[0]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pegee"}, r"expected one of .*, got 'pegee'\. Did you mean method 'pege'\?"),
        ({"scheme": "w9a8"}, "scheme 'w9a8': expected the form"),
        ({"options": {"thetta": "group"}}, "Did you mean .*theta"),
        ({"rules": [{"mtch": "head"}]}, "a mapping with the key match"),
        ({"rules": [{"match": "head", "weigth": None}]}, "Did you mean key 'weight'"),
        ({"rules": [{"match": "head", "weight": {"bit": 4}}]}, "Did you mean key 'bits'"),
        ({"config": QuantConfig(), "method": "lsq"}, "to stand alone, got .*beside it. Drop one"),
        ({"config": QuantConfig(), "options": {"theta": "group"}}, "to stand alone"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantCallback(**settings)


def test_config_from_yaml(tmp_path):
    config = QuantConfig.parse("dsq", "w4a8", rules=[LayerRule("head", weight=None)], calibration=3)
    config.to_yaml(tmp_path / "quant.yaml")
    assert QuantCallback(config=str(tmp_path / "quant.yaml")).config == config
    assert QuantCallback(config=config).config is config


def test_rules_as_mappings_reach_the_layers(tmp_path):
    rules = [{"match": "head", "weight": {"bits": 4}, "activation": None}, LayerRule("body.3", weight="w2-tensor")]
    quant = QuantCallback("ste", "w8a8", rules=rules)
    assert quant.config.rules[0].weight == TensorSpec(4)
    module = Cnn()
    trainer(tmp_path, quant, max_epochs=1).fit(module, images())
    bits = {p: (layer.weight_quant.spec.bits, layer.input_quant is not None) for p, layer in quant_layers(module)}
    assert bits == {"body.0": (8, True), "body.3": (2, True), "head": (4, False)}


# Lightning 2.6 calls jsonargparse the old way.
old_names = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def command_line(root: Path, monkeypatch: pytest.MonkeyPatch, callback: str) -> LightningCLI:
    (root / "run.yaml").write_text(
        f"""
model: {{class_path: tests.integration.modules.Cnn, init_args: {{width: 4}}}}
trainer:
  max_epochs: 1
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
{callback}
"""
    )
    monkeypatch.setattr("sys.argv", ["run.py", "--config", str(root / "run.yaml")])
    return LightningCLI(run=False, seed_everything_default=0, save_config_callback=None)


@old_names
def test_lightning_cli_builds_the_callback_from_yaml(tmp_path, monkeypatch):
    cli = command_line(
        tmp_path,
        monkeypatch,
        """
  - class_path: lightning_quant.QuantCallback
    init_args:
      method: dsq
      scheme: w4a8
      rules:
      - {match: head, weight: null}
      - {match: body.3, weight: {bits: 2, granularity: channel}}
      options: {calibration: 2, alpha: 0.1}
""",
    )
    (quant,) = (c for c in cli.trainer.callbacks if isinstance(c, QuantCallback))
    assert quant.config.method == "dsq"
    assert quant.config.calibration == 2
    assert quant.config.rules == (
        LayerRule("head", weight=None),
        LayerRule("body.3", weight=TensorSpec(2, granularity="channel")),
    )
    cli.trainer.fit(cli.model, images())
    assert {p: layer.weight_quant.spec.bits for p, layer in quant_layers(cli.model)} == {"body.0": 4, "body.3": 2}


@old_names
def test_lightning_cli_with_a_config_file(tmp_path, monkeypatch):
    config = QuantConfig.parse("lsq", "w4a16", rules=[LayerRule("head", weight=None)])
    config.to_yaml(tmp_path / "quant.yaml")
    cli = command_line(
        tmp_path,
        monkeypatch,
        f"""
  - class_path: lightning_quant.QuantCallback
    init_args: {{config: {tmp_path}/quant.yaml}}
""",
    )
    (quant,) = (c for c in cli.trainer.callbacks if isinstance(c, QuantCallback))
    assert quant.config == config
