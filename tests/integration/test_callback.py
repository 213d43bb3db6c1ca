"""QuantCallback's arguments, parts of a module, frozen layers and checkpoints, in a real lightning Trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn

from lightning_quant import QuantCallback, QuantConfig, attach
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.errors import AttachError, CheckpointError
from tests.integration.modules import QUIET, Cnn, Mlp, hard_output, images, learned, trainer
from tests.integration.test_lightning import Late, command_line, logged, old_names

pytestmark = QUIET


class Two(Cnn):
    """An encoder with batch normalization and a decoder of linear layers."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr=lr)
        self.encoder, self.body = self.body, None
        self.decoder, self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), None
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x)) * self.gain


def both(**settings: object) -> tuple[QuantCallback, QuantCallback]:
    """Encoder w4a16, decoder w8a8."""
    return (
        QuantCallback("lsq", "w4a16", module="encoder", **settings),
        QuantCallback("pege", "w8a8", module="decoder", schedule={"lam": {"curve": "linear", "end": 0.1}}, **settings),
    )


# Arguments


@old_names
def test_every_argument_from_yaml(tmp_path, monkeypatch):
    cli = command_line(
        tmp_path,
        monkeypatch,
        """
  - class_path: lightning_quant.QuantCallback
    init_args:
      method: dsq
      scheme: w4a8
      schedule: {alpha: {curve: hardness, start: 0.2, end: 0.02}}
      calibration: 2
      delay: 0.25
      strict: true
      module: body
      rules: [{match: "3", weight: {bits: 2, granularity: channel}}]
  - class_path: lightning_quant.QuantCallback
    init_args: {method: pege, schedule: {lam: 0.1, sharpness: 2}, module: head}
""",
    )
    body, head = (c for c in cli.trainer.callbacks if isinstance(c, QuantCallback))
    rules = body.config.rules
    schedule = {"curve": "hardness", "start": 0.2, "end": 0.02}
    assert body.config == QuantConfig.parse(
        "dsq", "w4a8", rules=rules, alpha=schedule, calibration=2, delay=0.25, strict=True
    )
    assert head.config == QuantConfig.parse("pege", "w8a8", lam=0.1, sharpness=2)
    cli.trainer.fit(cli.model, images())
    bits = {p: layer.weight_quant.spec.bits for p, layer in quant_layers(cli.model)}
    assert bits == {"body.0": 4, "body.3": 2, "head": 8}
    assert body.controller.start == 1
    assert body.controller.values()["alpha"] < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": {"lamb": 0.1}}, r"QuantCallback\.schedule: expected one of lam, sharpness, got 'lamb'"),
        ({"delay": 0.5, "options": {"delay": 3}}, r"each setting once, got delay in options and in arguments"),
        ({"delay": 1.5}, r"QuantConfig\.delay: expected a share below 1 or whole optimizer steps, got 1\.5"),
        ({"config": QuantConfig(), "calibration": 3}, r"to stand alone, got calibration beside it"),
        ({"config": QuantConfig(), "schedule": {"lam": 0.1}}, r"to stand alone, got schedule beside it"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantCallback(**settings)


# Parts


def test_two_callbacks_serve_two_parts(tmp_path):
    module, (encoder, decoder) = Two(), both()
    log = CSVLogger(tmp_path)
    runner = trainer(tmp_path, encoder, decoder, logger=log, log_every_n_steps=4, max_epochs=8)
    runner.fit(module, images(), images(seed=1))
    assert sum(module.losses[-4:]) < 0.8 * sum(module.losses[:4])
    found = {p: (q.spec.bits, type(q.estimator).__name__) for p, q in quantizers(module)}
    assert found == {
        "encoder.0.weight_quant": (4, "Lsq"),
        "encoder.3.weight_quant": (4, "Lsq"),
        **{f"decoder.{i}.{q}_quant": (8, "Pege") for i in (0, 2) for q in ("weight", "input")},
    }
    assert [e.path for e in encoder.report.attached] == ["0", "3"]
    assert encoder.report.coverage > 0.9
    groups = [{id(p) for p in g["params"]} for g in runner.optimizers[0].param_groups if g.get("quantizer")]
    assert sorted(i for g in groups for i in g) == sorted(id(p) for p in learned(module))
    own = runner.optimizers[0].param_groups[0]["params"]
    assert not {id(p) for p in own} & {id(p) for p in learned(module)}
    rows = logged(tmp_path)
    last = {p: [r for r in rows if r[f"quant/{p}/error"]][-1] for p in ("encoder", "decoder")}
    assert [int(row["step"]) for row in last.values()] == [31, 31]
    assert float(last["decoder"]["quant/decoder/lam"]) == pytest.approx(0.1 * 31 / 32)
    assert float(last["encoder"]["quant/encoder/error"]) > float(last["decoder"]["quant/decoder/error"]) > 0
    assert not {"quant/encoder/lam", "quant/lam", "quant/error"} & rows[0].keys()
    x = next(iter(images()))[0]
    plain = Two()
    for part in ("encoder", "decoder"):
        callback = {"encoder": encoder, "decoder": decoder}[part]
        callback.export(module, tmp_path / part, format="folded")
        plain.get_submodule(part).load_state_dict(load_file(tmp_path / part / "model.safetensors"))
    shipped = hard_output(plain, x)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "_quant." not in k})
    target = hard_output(module, x)
    assert (shipped - target).abs().max() < 0.5 * (hard_output(plain, x) - target).abs().max()


def test_parts_resume_and_test_by_checkpoint(tmp_path):
    whole, rest = Two(), Two()
    rest.load_state_dict(whole.state_dict())
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    runner = trainer(tmp_path, *both(calibration=6), save)
    runner.fit(whole, images())
    path = tmp_path / "epoch=1.ckpt"
    states = torch.load(path, weights_only=True)["callbacks"]
    keys = {k for k in states if k.startswith("QuantCallback")}
    assert keys == {"QuantCallback{'module': 'encoder'}", "QuantCallback{'module': 'decoder'}"}
    pair = both(calibration=6)
    trainer(tmp_path, *pair).fit(rest, images(), ckpt_path=path)
    assert whole.losses[8:] == rest.losses
    assert [c.controller.step for c in pair] == [15, 15]
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name
    other = Two()
    found = trainer(tmp_path, *both(calibration=6)).predict(other, images(), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert torch.equal(found[0], hard_output(whole, next(iter(images()))[0]))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["encodr"],
            r"\.module: expected the path of a submodule of Two, got 'encodr'\. Nearest: encoder",
        ),
        (["encoder", None], r"every layer in one part, got '\w+\.0' of module=None in module='encoder' as well"),
        (["encoder", "encoder.3"], r"got 'the part itself' of module='encoder\.3' in module='encoder' as well\. Name"),
    ],
)
def test_parts_that_cannot_be(tmp_path, paths, message):
    module = Two()
    with pytest.raises(AttachError, match=message):
        trainer(tmp_path, *(QuantCallback("lsq", "w4a16", module=p) for p in paths)).fit(module, images())
    assert not list(quantizers(module))


def test_parts_that_configure_model_makes(tmp_path):
    module = Late()
    callbacks = QuantCallback("lsq", "w4a16", module="body"), QuantCallback("lsq", module="late_head")
    trainer(tmp_path, *callbacks).fit(module, images())
    bits = {p: layer.weight_quant.spec.bits for p, layer in quant_layers(module)}
    assert bits == {"body.0": 4, "body.3": 4, "late_head": 8}


class Replaces(Cnn):
    """Puts another layer in place of a quantized one once callbacks have been set up."""

    def setup(self, stage: str) -> None:
        self.head = nn.Bilinear(4, 4, 4)


def test_layers_that_are_replaced_are_missed(tmp_path):
    with pytest.raises(AttachError, match=r"Replaces: expected all 3 quantized layers to stay, got 1 replaced"):
        trainer(tmp_path, QuantCallback("lsq")).fit(Replaces(), images())


# Frozen layers


class Frozen(Cnn):
    """Fine-tunes the head on a backbone that is frozen before training."""

    def __init__(self, no_grad: bool = False) -> None:
        super().__init__(lr=0.05)
        self.no_grad = no_grad
        self.body.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.no_grad):
            x = self.body(x)
        return self.head(x)


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("no_grad", [True, False])
@pytest.mark.parametrize("method", ["lsq", "pege"])
def test_frozen_backbone(tmp_path, method, no_grad, everything):
    module = Frozen(no_grad)
    if not everything:
        module.configure_optimizers = lambda: torch.optim.Adam(module.head.parameters(), lr=0.05)
    born = copy.deepcopy(module.body.state_dict())
    quant = QuantCallback(method, "w4a8", calibration=4)
    runner = trainer(tmp_path, quant, max_epochs=8)
    runner.fit(module, images())
    assert sum(module.losses[-4:]) < 0.8 * sum(module.losses[:4])
    assert all(not p.requires_grad and p.grad is None for p in learned(module.body))
    assert all(p.requires_grad and p.grad is not None for p in learned(module.head))
    held = {id(p) for g in runner.optimizers[0].param_groups if g.get("quantizer") for p in g["params"]}
    assert held == {id(p) for p in learned(module.head)}
    for name in ("0.weight", "3.weight"):
        assert torch.equal(module.body.state_dict()[name], born[name]), name
    assert all(layer.input_quant.ready for _, layer in quant_layers(module))


class Headless(Cnn):
    """Gives the optimizer the body alone, with the head still asking for gradients."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.body.parameters())


def test_layer_that_no_optimizer_holds(tmp_path):
    message = r"head\.weight_quant\.scale: expected .* in an optimizer, got 1 in none \(head.*freeze"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, QuantCallback("lsq", "w4a16")).fit(Headless(), images())


class Backbone(Mlp):
    """Lightning's own recipe for fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.body = self.body, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize("first", [True, False])
def test_backbone_that_is_unfrozen_later(tmp_path, first):
    module, scales = Backbone(), []

    class Note(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            scales.append(pl_module.backbone[1].weight_quant.scale.clone())

    callbacks = [QuantCallback("lsq", "w4a16-channel"), BackboneFinetuning(2, backbone_initial_ratio_lr=0.5)]
    trainer(tmp_path, *callbacks[:: 1 if first else -1], Note()).fit(module, images())
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[1], scales[2])


# Checkpoints


class Saved(Cnn):
    """Keeps its arguments in the checkpoint."""

    def __init__(self, width: int = 8, lr: float = 0.05) -> None:
        super().__init__(width=width, lr=lr)
        self.save_hyperparameters()


def fitted(root: Path, module: L.LightningModule, *callbacks: L.Callback) -> Path:
    save = ModelCheckpoint(root, filename="run")
    trainer(root, *callbacks, save, max_epochs=2).fit(module, images())
    return root / "run.ckpt"


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("part", [None, "encoder"])
def test_checkpoint_of_a_float_run_is_refused_with_the_cure(tmp_path, stage, part):
    path = fitted(tmp_path, Two())
    quant = QuantCallback("lsq", "w4a8", module=part)
    message = r"ckpt_path: .* got the weights of a float run, .* \d quantizers\. .* Two\.load_from_checkpoint\(path\)"
    with pytest.raises(CheckpointError, match=message):
        getattr(trainer(tmp_path, quant), stage)(Two(), images(), ckpt_path=path)
    module = Two.load_from_checkpoint(path)
    getattr(trainer(tmp_path, quant), stage)(module, images())
    module.load_state_dict(Two().state_dict(), strict=False)  # after the run loading is the user's business


def test_state_free_quantizers_take_a_float_checkpoint(tmp_path):
    """Scales that follow weight and input have nothing to load."""
    float_module = Two()
    path = fitted(tmp_path, float_module)
    module = Two()
    quant = QuantCallback("ste", "w8a8-dynamic", module="decoder")
    trainer(tmp_path, quant).test(module, images(), ckpt_path=path, verbose=False)
    assert torch.equal(module.decoder[0].weight, float_module.decoder[0].weight)


def test_quantized_module_from_a_checkpoint(tmp_path):
    module = Saved(width=4)
    path = fitted(tmp_path, module, QuantCallback("pege", "w4a8", rules=[{"match": "body.3", "weight": "w2-channel"}]))
    x = next(iter(images(seed=1)))[0]
    expected = hard_output(module, x)
    found = QuantCallback.load_from_checkpoint(Saved, path, map_location="cpu", lr=0.125)
    assert not found.training
    assert (found.hparams.width, found.lr) == (4, 0.125)
    assert torch.equal(found(x), expected)
    assert found.body[3].weight_quant.spec.bits == 2
    state = module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    # It trains on with the same config, and with no other.
    again = QuantCallback("pege", "w4a8", rules=[{"match": "body.3", "weight": "w2-channel"}])
    trainer(tmp_path, again, max_epochs=1).fit(found.train(), images())
    assert len(found.losses) == 4
    with pytest.raises(AttachError, match=r"body\.0: expected quantizers .* \(pege at w3a8\), got pege at w4a8"):
        trainer(tmp_path, QuantCallback("pege", "w3a8")).fit(found, images())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*weight_quant"):
        Saved.load_from_checkpoint(path)  # as README says


def test_quantized_parts_from_a_checkpoint(tmp_path):
    module = Two()
    path = fitted(tmp_path, module, *both())
    found = QuantCallback.load_from_checkpoint(Two, path)
    x = next(iter(images(seed=1)))[0]
    assert torch.equal(found(x), hard_output(module, x))
    assert {p: q.spec.bits for p, q in quantizers(found)} == {p: q.spec.bits for p, q in quantizers(module)}


def test_quantized_module_whose_layers_configure_model_makes(tmp_path):
    module = Late()
    path = fitted(tmp_path, module, QuantCallback("lsq", "w4a8"))
    found = QuantCallback.load_from_checkpoint(Late, path)
    x = next(iter(images(seed=1)))[0]
    assert torch.equal(found(x), hard_output(module, x))


def test_checkpoint_without_quantizers_is_not_loaded_as_one(tmp_path):
    path = fitted(tmp_path, Saved())
    message = r"run\.ckpt: expected a checkpoint of a run with QuantCallback, got .*ModelCheckpoint.*Saved\.load_"
    with pytest.raises(CheckpointError, match=message):
        QuantCallback.load_from_checkpoint(Saved, path)


def test_module_with_quantizers_put_in_by_hand(tmp_path):
    by_hand, module = Cnn(), Cnn()
    by_hand.load_state_dict(module.state_dict())
    attach(by_hand, QuantConfig.parse("lsq", "w4a8", calibration=4))
    for net in (by_hand, module):
        trainer(tmp_path, QuantCallback("lsq", "w4a8", calibration=4)).fit(net, images())
    assert by_hand.losses == module.losses
    with pytest.raises(AttachError, match=r"body\.0: expected quantizers .* \(dsq at w4a8\), got lsq at w4a8"):
        trainer(tmp_path, QuantCallback("dsq", "w4a8")).fit(by_hand, images())
