"""What users could not do with the quantization callback that Lightning had until 2.0: one test for each report.

The numbers are those of Lightning's issues and pull requests.
"""

from __future__ import annotations

import lightning as L  # noqa: N812
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import QuantCallback
from lightning_quant.attach import is_attached, quant_layers, quantizers
from lightning_quant.export import verify
from lightning_quant.norms import FoldedBatchNorm
from tests.integration.modules import QUIET, Cnn, Words, hard_output, images, trainer, words
from tests.integration.tiny import causal_lm, token_batch, token_rows

pytestmark = QUIET


# #15862: the wrapper around forward took positional arguments only.
def test_forward_takes_keyword_arguments(tmp_path):
    module = Words()
    trainer(tmp_path, QuantCallback(), max_epochs=10).fit(module, words())
    assert sum(module.losses[-4:]) < 0.8 * sum(module.losses[:4])
    assert len(list(quant_layers(module))) == 2 * 6 + 1
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    tokens = torch.arange(6)[None]
    assert not torch.equal(module(mask=mask, tokens=tokens), module(tokens=tokens))


# #12896: test(ckpt_path=...) failed once fit had converted the module.
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_checkpoint_path_after_training(tmp_path, scheme):
    module = Cnn()
    save = ModelCheckpoint(tmp_path, filename="last")
    first = trainer(tmp_path, QuantCallback("pege", scheme), save)
    first.fit(module, images())
    path = tmp_path / "last.ckpt"
    x = next(iter(images(seed=1)))[0]
    expected = hard_output(module, x)
    loss = first.test(module, images(seed=1), verbose=False)[0]["test_loss"]

    def fresh() -> tuple[L.Trainer, Cnn]:
        return trainer(tmp_path, QuantCallback("pege", scheme)), Cnn()

    runner, other = fresh()
    assert runner.test(other, images(seed=1), ckpt_path=path, verbose=False)[0]["test_loss"] == loss
    assert torch.equal(hard_output(other, x), expected)
    runner, other = fresh()
    assert runner.validate(other, images(seed=1), ckpt_path=path, verbose=False)[0]["val_loss"] == loss
    runner, other = fresh()
    found = runner.predict(other, images(seed=1), ckpt_path=path)
    assert torch.equal(found[0], expected)


# #12890: modules in training mode were fused with the function for evaluation, which drops batch normalization.
def test_normalization_is_fused_in_training_mode(tmp_path):
    module = Cnn()
    born = {name: value.clone() for name, value in module.state_dict().items()}
    quant = QuantCallback("lsq", "w4a8", options={"batch_norm": "two_pass"})
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            seen.append(module.body[1].training)

    trainer(tmp_path, quant, Watch(), max_epochs=10).fit(module, images())
    assert all(seen)
    assert sum(module.losses[-4:]) < 0.5 * sum(module.losses[:4])
    for norm in (module.body[1], module.body[4]):
        assert isinstance(norm, FoldedBatchNorm)
        assert int(norm.num_batches_tracked) == 40
    after = module.state_dict()
    for name in ("body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var"):
        assert not torch.equal(after[name], born[name]), name
    x = next(iter(images(seed=1)))[0]
    want = hard_output(module, x)
    quant.export(module, tmp_path / "out")
    plain = Cnn()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    for (_, layer), inner in zip(quant_layers(module), (plain.body[0], plain.body[3], plain.head), strict=True):
        q = layer.input_quant
        inner.register_forward_pre_hook(lambda m, args, q=q: (q(args[0]),))
    torch.testing.assert_close(hard_output(plain, x), want)


# #7427: the first fit had converted the module.
def test_fit_twice(tmp_path):
    module, quant = Cnn(), QuantCallback()
    trainer(tmp_path, quant, max_epochs=2).fit(module, images())
    before = dict(quantizers(module))
    first = quant.report
    trainer(tmp_path, quant, max_epochs=2).fit(module, images())
    assert dict(quantizers(module)) == before
    assert quant.report is first
    other = QuantCallback()
    runner = trainer(tmp_path, other, max_epochs=6)
    runner.fit(module, images())
    assert dict(quantizers(module)) == before
    assert runner.global_step == 24
    assert module.losses[-1] < module.losses[0]


class HoldsTransformer(L.LightningModule):
    """A module around a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = causal_lm().train()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


# #7552: the exported model had lost the quantizer of its input.
def test_export_keeps_the_input_quantizers(tmp_path):
    rows = [{k: torch.tensor(v) for k, v in row.items()} for row in token_rows(32)]
    module, quant = HoldsTransformer(), QuantCallback("pege", "w8a8-static")
    trainer(tmp_path, quant, max_epochs=2).fit(module, DataLoader(rows, batch_size=4))
    classes = {p: type(m) for p, m in module.named_modules()}
    report = quant.export(module, tmp_path / "out")
    assert report.format == "compressed-tensors"
    assert {p: type(m) for p, m in module.named_modules()} == classes
    stored = load_file(tmp_path / "out" / "model.safetensors")
    inputs = [(p, layer.input_quant) for p, layer in quant_layers(module.model)]
    assert len(inputs) == 14
    for path, q in inputs:
        assert q.ready
        assert torch.equal(stored[f"{path}.input_scale"].flatten(), q.scale.detach()), path
    assert verify(tmp_path / "out", module.model, token_batch()).ok


# #11047: ModelPruning and quantization could not be used in one run.
def test_together_with_pruning(tmp_path):
    module = Cnn()
    prune = ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False, verbose=0)
    quant = QuantCallback("lsq", "w4a16")
    trainer(tmp_path, quant, prune, max_epochs=3).fit(module, images())
    assert module.losses[-1] < module.losses[0]
    pruned = torch.cat([layer.weight.flatten() == 0 for _, layer in quant_layers(module)])
    assert 0.4 < pruned.float().mean() < 0.95
    for path, layer in quant_layers(module):
        assert not layer.weight_quant.on_grid(layer.weight)[layer.weight == 0].any(), path
        assert layer.weight_quant.on_grid(layer.weight).any(), path


# #10968: the trained module could not be called on test data.
def test_testing_runs_the_quantized_module(tmp_path):
    module = Cnn()
    runner = trainer(tmp_path, QuantCallback("ste", "w2a2"))
    runner.fit(module, images())
    quantized = runner.test(module, images(), verbose=False)[0]["test_loss"]
    kept = {k: v for k, v in module.state_dict().items() if "_quant." not in k}
    plain = Cnn()
    plain.load_state_dict(kept)
    assert trainer(tmp_path).test(plain, images(), verbose=False)[0]["test_loss"] != quantized
    losses = [nn.functional.cross_entropy(hard_output(module, x), y) for x, y in images()]
    assert float(torch.stack(losses).mean()) == pytest.approx(quantized)


# #6457, pull request 8485: a run could not be resumed (test_resume_phases.py stops runs in every phase).
def test_resume(tmp_path):
    options = {"lam": {"curve": "linear", "start": 0.0, "end": 0.1}}
    whole, half, rest = Cnn(), Cnn(), Cnn()
    for net in (half, rest):
        net.load_state_dict(whole.state_dict())
    trainer(tmp_path, QuantCallback(options=options), max_epochs=4).fit(whole, images())

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    save = ModelCheckpoint(tmp_path, filename="half", save_on_train_epoch_end=True)
    trainer(tmp_path, QuantCallback(options=options), Stop(), save, max_epochs=4).fit(half, images())
    path = tmp_path / "half.ckpt"
    quant = QuantCallback(options=options)
    trainer(tmp_path, quant, max_epochs=4).fit(rest, images(), ckpt_path=path)
    assert half.losses + rest.losses == whole.losses
    assert quant.controller.values()["lam"] == pytest.approx(0.1 * 15 / 16)
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value), name

    with pytest.raises(ValueError, match=r"options.*Resume with the config the run was started with"):
        trainer(tmp_path, QuantCallback(options={"lam": 0.5})).fit(Cnn(), images(), ckpt_path=path)


# Pull request 10793: converting when fitting ends did not match what comes after it.
def test_nothing_is_converted_inside_fit(tmp_path):
    module, quant = Cnn(), QuantCallback()
    trainer(tmp_path, quant, max_epochs=1, log_every_n_steps=1, logger=CSVLogger(tmp_path)).fit(module, images())
    assert quant.controller.step < quant.config.calibration
    assert is_attached(module)
    assert not any(q.observing or q.measuring for _, q in quantizers(module))
    ranges = [q.scale.clone() for _, q in quantizers(module) if not q.spec.dynamic]
    trainer(tmp_path, quant).predict(module, images())
    module.train()
    module(100 * next(iter(images()))[0])
    assert all(q.noted is None for _, q in quantizers(module))
    trainer(tmp_path, quant).test(module, images(), verbose=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(ranges, [q.scale for _, q in quantizers(module) if not q.spec.dynamic], strict=True)
    )
