"""Quantization delay, best checkpoints, averaged weights and gradient scalers in a real lightning Trainer."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_quant import QuantCallback
from lightning_quant.attach import quantizers
from tests.integration.modules import QUIET, Cnn, Mlp, images, trainer

pytestmark = QUIET


# The float phase


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_training_is_float_until_the_delay_is_over(tmp_path, settings):
    plain, module = Cnn(), Cnn()
    module.load_state_dict(plain.state_dict())
    trainer(tmp_path, **settings).fit(plain, images())
    quant = QuantCallback("pege", "w2a2", delay=0.5)
    runner = trainer(tmp_path, quant, **settings)
    runner.fit(module, images())
    assert quant.controller.start == runner.global_step // 2
    assert module.losses[:8] == plain.losses[:8]
    assert module.losses[8] != plain.losses[8]


def test_manual_optimization_counts_batches(tmp_path):
    class Manual(Mlp):
        def __init__(self) -> None:
            super().__init__(lr=0.05)
            self.automatic_optimization = False
            self.started: list[float] = []

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.started.append(float(self.head.weight_quant.started))
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    module = Manual()
    trainer(tmp_path, QuantCallback("lsq", "w4a8-channel", delay=6)).fit(module, images())
    assert module.started == [0.0] * 6 + [1.0] * 10


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resuming_before_at_and_after_the_start(tmp_path, epoch):
    whole, rest = Cnn(), Cnn()
    rest.load_state_dict(whole.state_dict())
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    settings = {"delay": 8, "calibration": 2}
    trainer(tmp_path, QuantCallback("lsq", "w4a4", **settings), save).fit(whole, images())
    runner = trainer(tmp_path, QuantCallback("lsq", "w4a4", **settings))
    runner.fit(rest, images(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert rest.losses == whole.losses[4 * (epoch + 1) :]
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name


# Best checkpoints


class Fades(Cnn):
    """Scores worse with every epoch."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("score", 10.0 - self.current_epoch)
        self.log("loss", 1.0 + self.current_epoch)


def watchers(root: Path) -> tuple[ModelCheckpoint, ModelCheckpoint, EarlyStopping]:
    return (
        ModelCheckpoint(root, filename="{epoch}", monitor="score", mode="max", save_last="link"),
        ModelCheckpoint(root, filename="low-{epoch}", monitor="loss", save_top_k=2),
        EarlyStopping("score", mode="max", patience=2),
    )


def test_the_best_is_chosen_among_quantized_models(tmp_path, caplog):
    save, low, stop = watchers(tmp_path)
    seen: list[object] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            if trainer.global_step == 8:
                seen.extend([save.best_model_score, save.current_score, save.best_model_path, save.last_model_path])
                seen.extend([float(save.kth_value), float(stop.best_score), stop.wait_count])

    callbacks = save, QuantCallback("lsq", "w4a8", delay=8), low, stop, Note()
    runner = trainer(tmp_path, *callbacks, max_epochs=4)
    with caplog.at_level(logging.INFO):
        runner.fit(Fades(), images(), images(seed=1))
    assert seen == [None, None, "", str(tmp_path / "last.ckpt"), -math.inf, -math.inf, 0]
    assert runner.current_epoch == 4  # two epochs without gain, but none of them quantized
    assert Path(save.best_model_path).name == "epoch=2.ckpt"
    assert float(save.best_model_score) == 8
    assert save.best_k_models.keys() == {save.best_model_path}
    assert {Path(p).name for p in low.best_k_models} == {"low-epoch=2.ckpt", "low-epoch=3.ckpt"}
    assert (float(stop.best_score), stop.wait_count) == (8, 1)
    assert (tmp_path / "epoch=0.ckpt").exists()
    assert (tmp_path / "last.ckpt").resolve() == Path(save.best_model_path).resolve()
    lines = [r.getMessage() for r in caplog.records if "from now on" in r.getMessage()]
    assert len(lines) == 1
    for words in ("10 of ModelCheckpoint('score')", "1 of ModelCheckpoint('loss')", "10 of EarlyStopping('score')"):
        assert words in lines[0]


def test_without_a_delay_nothing_is_forgotten(tmp_path):
    save, _, stop = watchers(tmp_path)
    runner = trainer(tmp_path, save, QuantCallback("lsq", "w4a8"), stop)
    runner.fit(Fades(), images(), images(seed=1))
    assert runner.current_epoch == 3
    assert Path(save.best_model_path).name == "epoch=0.ckpt"


# A resumed run writes where the first one did.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("epoch", "forgets"), [(0, 1), (1, 1), (2, 0)])
def test_the_best_is_forgotten_once_when_resumed(tmp_path, caplog, epoch, forgets):
    every = ModelCheckpoint(tmp_path, filename="all-{epoch}", save_top_k=-1, every_n_epochs=1)
    save, *_ = watchers(tmp_path)
    trainer(tmp_path, QuantCallback("lsq", "w4a8", delay=8), save, every).fit(Fades(), images(), images(seed=1))
    save, *_ = watchers(tmp_path)
    runner = trainer(tmp_path, QuantCallback("lsq", "w4a8", delay=8), save)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        runner.fit(Fades(), images(), images(seed=1), ckpt_path=tmp_path / f"all-epoch={epoch}.ckpt")
    assert sum("from now on" in r.getMessage() for r in caplog.records) == forgets
    assert Path(save.best_model_path).name.startswith("epoch=2")


# Averaged weights


@pytest.mark.parametrize("delay", [None, 6])
@pytest.mark.parametrize("method", ["lsq", "pege"])
@pytest.mark.parametrize(
    "average",
    [
        lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1),
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: WeightAveraging(),
    ],
)
def test_averaging_after_the_callback(tmp_path, average, method, delay):
    module, callback = Cnn(lr=0.01), average()
    quant = QuantCallback(method, "w4a8", delay=delay, calibration=2)
    trainer(tmp_path, quant, callback, max_epochs=6).fit(module, images(), images(seed=1))
    assert module.losses[-1] < module.losses[0]
    averaged = getattr(callback._average_model, "module", callback._average_model)
    pairs = list(zip(quantizers(module), quantizers(averaged), strict=True))
    assert len(pairs) == 6
    for (path, q), (_, other) in pairs:
        assert q.ready
        assert bool((q.scale > 0).all()), path
        assert torch.equal(q.scale, other.scale), path
    runner = trainer(tmp_path, QuantCallback(method, "w4a8", delay=delay, calibration=2))
    assert runner.validate(module, images(), verbose=False)[0]["val_loss"] < math.log(4)


@pytest.mark.parametrize("average", [StochasticWeightAveraging, WeightAveraging])
def test_averaging_that_copied_the_float_module_is_refused(tmp_path, average):
    module = Cnn()
    callback = average(0.01) if average is StochasticWeightAveraging else average()
    with pytest.raises(ValueError, match=rf"{average.__name__}: expected .* a copy in float\. Put Quant"):
        trainer(tmp_path, callback, QuantCallback("lsq")).fit(module, images())
    assert module.losses == []


def test_averaging_between_the_callbacks_of_two_parts_is_refused(tmp_path):
    first, second = QuantCallback("lsq", module="body"), QuantCallback("lsq", module="head")
    with pytest.raises(ValueError, match=r"WeightAveraging: expected .* Put QuantCallback before it"):
        trainer(tmp_path, first, WeightAveraging(), second).fit(Cnn(), images())


# Gradient scalers


class Scaled(MixedPrecision):
    """A gradient scaler in a precision where its powers of two change nothing."""

    def autocast_context_manager(self):
        return contextlib.nullcontext()


class Spikes(Mlp):
    """Steps whose loss overflows; keeps the quantizers' state around them."""

    def __init__(self, at: tuple[int, ...] = ()) -> None:
        super().__init__(lr=0.1)
        self.at = at
        self.states: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.states.append({k: v.clone() for k, v in self.state_dict().items() if "running" not in k})
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.trainer.global_step in self.at else loss


def with_scaler(kind: type[MixedPrecision], scale: float = 1024.0) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return kind("16-mixed", device="cpu", scaler=scaler)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("method", "options"), [("pege", {"initial": 0.5}), ("dampen", {})])
def test_the_progressive_term_under_a_gradient_scaler(tmp_path, method, options, accumulate):
    """``dampen`` pulls as ``pege`` does; ``dsq`` has no such term, and its learned alpha is compared below."""
    runs = {}
    for name, lam, plugins in (
        ("plain", 0.05, []),
        ("scaled", 0.05, [with_scaler(Scaled)]),
        ("without", 0.0, []),
    ):
        torch.manual_seed(0)
        runs[name] = Mlp(lr=0.1)
        quant = QuantCallback(method, "w4a8-g32", schedule={"lam": lam}, options=options)
        runner = trainer(tmp_path, quant, plugins=plugins, accumulate_grad_batches=accumulate)
        runner.fit(runs[name], images())
        if name == "scaled":
            assert runner.precision_plugin.scaler.get_scale() > 1024  # it has grown on the way
    for name, value in runs["plain"].state_dict().items():
        torch.testing.assert_close(runs["scaled"].state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert (runs["plain"].head.weight - runs["without"].head.weight).abs().max() > 2e-3


def test_learned_alpha_under_a_gradient_scaler(tmp_path):
    runs = []
    for plugins in ([], [with_scaler(Scaled)]):
        torch.manual_seed(0)
        runs.append(Mlp(lr=0.1))
        trainer(tmp_path, QuantCallback("dsq", "w4a8-g32"), plugins=plugins).fit(runs[-1], images())
    for name, value in runs[0].state_dict().items():
        torch.testing.assert_close(runs[1].state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert bool((runs[0].head.weight_quant.alpha != 0.2).all())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pege", {"lam": {"curve": "linear", "end": 0.1}}),
        ("pege", {"theta": "element", "initial": 0.5}),
        ("dsq", {}),
        ("freeze", {}),
    ],
)
def test_steps_that_the_scaler_skips_change_nothing(tmp_path, method, options):
    module, at = Spikes((2, 9)), (2, 9)
    quant = QuantCallback(method, "w4a8-g32-static", calibration=4, delay=2, options=options)
    runner = trainer(tmp_path, quant, plugins=[with_scaler(MixedPrecision)])
    runner.fit(module, images())
    assert runner.global_step == 16
    assert quant.controller.step == 15
    for step in range(4, 15):
        now, after = module.states[step], module.states[step + 1]
        changed = {name for name, value in now.items() if not torch.equal(after[name], value)}
        assert bool(changed) == (step not in at), (step, changed)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    if "lam" in options:
        assert quant.controller.values()["lam"] == pytest.approx(0.1 * 15 / 16)
    assert module.losses[-1] < module.losses[0]
