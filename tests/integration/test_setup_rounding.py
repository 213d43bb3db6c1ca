"""Steps of set-up that need quantizers: training starts from exactly the integers that a rounding chose."""

from __future__ import annotations

from pathlib import Path

import lightning as L  # noqa: N812
import pytest
import torch
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_integration import QuantArguments, QuantTrainer, load_training_checkpoint
from hf_integration.launch import quantized_trainers
from lightning_quant import QuantCallback, QuantConfig, QuantController
from lightning_quant.attach import quant_layers, quantizers
from lightning_quant.export import verify
from lightning_quant.rounding import round_model
from lightning_quant.transforms import Inputs, smoothquant
from tests.integration.modules import QUIET, Cnn, Words, images, trainer, words
from tests.integration.processes import differing, result, run
from tests.integration.tiny import causal_lm, token_batch, token_rows

pytestmark = QUIET
LOADED = "that of the checkpoint that was loaded"


def codes(model: nn.Module) -> dict[str, Tensor]:
    """Integers and scales of every weight, as an export would store them."""
    found = {}
    for path, layer in quant_layers(model):
        found[f"{path}.codes"], scale, _, _ = (
            t.clone() if isinstance(t, Tensor) else t for t in layer.weight_quant.stored(layer.weight)
        )
        found[f"{path}.scale"] = scale
    return found


class First:
    """What the first training forward computes with, seen at its layers; and the codes before it."""

    def __init__(self) -> None:
        self.codes: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}

    def watch(self, model: nn.Module) -> None:
        self.codes = codes(model)
        for path, layer in quant_layers(model):
            layer.weight_quant.register_forward_hook(lambda q, args, y, path=path: self.see(path, q, y))

    def see(self, path: str, q: nn.Module, y: Tensor) -> None:
        if q.training:
            self.used.setdefault(path, y.detach().clone())

    def check(self, model: nn.Module, want: dict[str, Tensor]) -> None:
        assert differing(self.codes, want) == []
        assert set(self.used) == {path for path, _ in quant_layers(model)}
        for path, layer in quant_layers(model):
            q, stored = layer.weight_quant, want[f"{path}.codes"]
            real = q.granularity.view(stored).float() * q.granularity.lift(want[f"{path}.scale"])
            assert torch.equal(self.used[path], q.granularity.unview(real, stored.shape)), path


class Keep(L.Callback):
    def __init__(self) -> None:
        self.first = First()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first.watch(pl_module)


class KeepHf(TrainerCallback):
    def __init__(self) -> None:
        self.first = First()

    def on_train_begin(self, *args: object, model: nn.Module, **kwargs: object) -> None:
        self.first.watch(model)


def by_hand(method: str, scheme: str, rounding: str, of_weights: bool = False, **options: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Words()
    batches = [Inputs((), {"tokens": rows}) for (rows,) in words()]
    smoothquant(model, batches)
    round_model(model, QuantConfig.parse(method, scheme), batches, rounding, **options)
    return {k: v.detach() for k, v in model.named_parameters()} if of_weights else codes(model)


@pytest.mark.parametrize(
    ("method", "scheme", "rounding"),
    [
        ("ste", "w4a8-g16", "gptq"),
        ("lsq", "w3a8-g16-static", "gptq"),
        ("pege", "w8a8", "gptq"),
        ("ewgs", "w4a16-g16", {"name": "adaround", "iterations": 20}),
        ("dsq", "nf4-g16", "rtn"),
    ],
)
def test_lightning_starts_from_the_rounding_s_codes(tmp_path, method, scheme, rounding):
    torch.manual_seed(0)
    module, keep = Words(), Keep()
    quant = QuantCallback(method, scheme, setup=["smoothquant", rounding])
    trainer(tmp_path, quant, keep, max_epochs=1).fit(module, words())
    name, options = (rounding, {}) if isinstance(rounding, str) else ("adaround", {"iterations": 20})
    want = by_hand(method, scheme, name, **options)
    assert differing(keep.first.codes, want) == []
    if scheme != "nf4-g16":
        keep.first.check(module, want)
    report = str(quant.report)
    assert "smoothquant: " in report
    assert f"{name}: " in report
    if name != "rtn":
        nearest = by_hand(method, scheme, "rtn")
        assert any(not torch.equal(nearest[k], v) for k, v in want.items() if k.endswith("codes"))
        assert "relative squared error of outputs" in report
    assert len(module.losses) == 4


def test_lightning_resumes_without_rounding_again(tmp_path):
    def fit(epochs: int, *callbacks: L.Callback, **kwargs: object) -> tuple[L.LightningModule, QuantCallback]:
        torch.manual_seed(0)
        module, quant = Words(), QuantCallback("lsq", "w4a8-g16-static", setup=["smoothquant", "gptq"])
        trainer(tmp_path, quant, *callbacks, max_epochs=epochs).fit(module, words(), **kwargs)
        return module, quant

    whole, _ = fit(2)
    fit(1, ModelCheckpoint(tmp_path, save_last=True))
    resumed, quant = fit(2, ckpt_path=tmp_path / "last.ckpt")
    assert quant.report.setup == LOADED
    assert differing(whole.state_dict(), resumed.state_dict()) == []
    assert resumed.losses == whole.losses[4:]
    trainer(tmp_path, quant, max_epochs=1).fit(resumed, words())  # goes on from there
    assert quant.report.setup == LOADED


def test_lightning_convolutions_and_a_part_of_a_module(tmp_path):
    class Two(Cnn):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    torch.manual_seed(0)
    net, quant = Two(), QuantCallback("ste", "w3a8", setup=["equalize", "gptq"], module="body")
    trainer(tmp_path, quant, max_epochs=1).fit(net, images())
    (rounding,) = quant.report.setup.chosen
    assert sorted(rounding.errors) == ["0", "3"]
    assert all(after < before for before, after in rounding.errors.values())


def test_a_module_that_is_sharded_later_and_its_resumed_run(tmp_path):
    """Rounded before it is sharded; a checkpoint's weights are loaded over what the resumed run rounds."""
    run("setup_sharded_run.py", "--out", tmp_path, processes=2)
    first, second = (result(tmp_path, rank) for rank in (0, 1))
    for part in ("begin", "end", "resumed"):
        assert differing(first[part], second[part]) == []
    assert differing(first["end"], first["resumed"]) == []
    want = by_hand("ste", "w3a8-g16", "gptq", of_weights=True)
    assert differing({name: first["begin"][name] for name in want}, want) == []


# ---- transformers


def hf(root: Path, setup: object, keep: KeepHf | None = None, **settings: object) -> QuantTrainer:
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no"}
    defaults |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    args = TrainingArguments(str(root / "run"), **{"max_steps": 4, **defaults, **settings})
    config = QuantConfig.parse("ste", "w3a16-g32", setup=setup)
    rows = Dataset.from_list(token_rows(32))
    kwargs = {"train_dataset": rows, "eval_dataset": rows, "data_collator": default_data_collator}
    made = QuantTrainer(model=causal_lm(), args=args, quant=config, **kwargs)
    if keep is not None:
        made.add_callback(keep)
    return made


def of_llama() -> dict[str, Tensor]:
    """Batches come in the order of training's own sampler, with the config's seed."""
    model = causal_lm()
    rows = hf(Path("unused"), ["smoothquant"])._setup_inputs()
    smoothquant(model, rows)
    round_model(model, QuantConfig.parse("ste", "w3a16-g32"), rows, "gptq")
    return codes(model)


def losses(trained: QuantTrainer) -> list[float]:
    return [e["loss"] for e in trained.state.log_history if "loss" in e]


def test_trainer_starts_from_the_rounding_s_codes_and_resumes_without_it(tmp_path, capsys):
    setup, want = ["smoothquant", "gptq"], of_llama()
    capsys.readouterr()
    keep = KeepHf()
    whole = hf(tmp_path / "whole", setup, keep)
    assert "gptq: waits for training, evaluation, saving or an export" in capsys.readouterr().out
    whole.train()
    assert "gptq: 14 layers or blocks, relative squared error of outputs" in capsys.readouterr().out
    keep.first.check(whole.model, want)
    hf(tmp_path / "half", setup, save_strategy="steps", save_steps=2).train()
    resumed = hf(tmp_path / "half", setup)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "run" / "checkpoint-2"))
    assert resumed.quant_report.setup == LOADED
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    assert differing(whole.model.state_dict(), resumed.model.state_dict()) == []


@pytest.mark.parametrize("first", ["evaluate", "save", "export"])
def test_whatever_comes_first_has_the_rounding_s_codes(tmp_path, first):
    made, want = hf(tmp_path, ["smoothquant", "gptq"]), of_llama()
    if first == "evaluate":
        made.evaluate()
    elif first == "save":
        made.save_model(str(tmp_path / "saved"))
        assert differing(codes(load_training_checkpoint(tmp_path / "saved")), want) == []
    else:
        made.export(tmp_path / "out")
        assert verify(tmp_path / "out", made.model).ok
    assert differing(codes(made.model), want) == []
    made.train()
    assert len(made.quant_report.setup.chosen) == 1  # once


def test_flags_of_a_script_and_a_recipe(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    data = {"train_dataset": Dataset.from_list(token_rows(16)), "data_collator": default_data_collator}
    flags = QuantArguments(
        quant="ste", quant_scheme="w4a8-g32", quant_setup=["smoothquant,{name: adaround, iterations: 5}"]
    )
    flags.to_config().to_yaml(tmp_path / "recipe.yaml")
    for given in (flags, QuantArguments(quant_config=str(tmp_path / "recipe.yaml"))):
        with quantized_trainers(given):
            made = Trainer(causal_lm(), args, **data)
            made.train()
        setup = made.quant_report.setup
        assert [a.what for a in setup.applied] == ["smoothquant"] * 9
        assert [r.rounding for r in setup.chosen] == ["adaround"]


def test_blocks_are_weighed_by_the_gradients_of_the_model_s_own_loss(tmp_path):
    """The batches that ``compute_loss`` hands over hold labels."""
    made = hf(tmp_path, [{"name": "brecq", "iterations": 5}])
    assert all("labels" in inputs.kwargs for inputs in made._setup_inputs())
    made.train()
    assert list(made.quant_report.setup.chosen[0].errors) == ["model.layers.0", "model.layers.1"]


# ---- ranges


def test_ranges_that_lapq_chose_stay(tmp_path):
    """Calibration steps move ranges of activations; chosen ones are not touched."""
    moved = {}
    for setup in (["lapq"], ["gptq"]):
        torch.manual_seed(0)
        module, ranges = Cnn(), []

        class See(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, *args, found=ranges):
                found.append([q.scale.clone() for _, q in quantizers(pl_module) if not q.is_weight])

        quant = QuantCallback("ste", "w4a4", setup=setup)
        trainer(tmp_path, quant, See(), max_epochs=1).fit(module, images())
        moved[setup[0]] = any(not torch.equal(a, b) for a, b in zip(ranges[0], ranges[-1], strict=True))
        assert len(ranges) == 4
    assert moved == {"lapq": False, "gptq": True}
    assert quant.report.setup.chosen


def test_lapq_then_a_rounding_on_its_ranges():
    model = causal_lm()
    config = QuantConfig.parse("ste", "w3a8-g32-static", setup=[{"name": "lapq", "evaluations": 40}, "gptq"])
    report = QuantController(config).prepare(model, batches=lambda: [token_batch(4, seed=s) for s in range(3)])
    ranges, rounding = report.setup.chosen
    assert ranges.ranges == 28
    assert ranges.after <= ranges.before
    assert all(after < before for before, after in rounding.errors.values())
    assert str(report).startswith("set-up: lapq: 28 ranges, mse ")
    assert not any(q.called for _, q in quantizers(model))  # coverage asks for training's own forwards


# ---- what does not go together


@pytest.mark.parametrize(
    ("method", "settings", "match"),
    [
        ("ste", {"delay": 0.1}, "gptq: expected training that is quantized from its first step, got delay=0.1"),
        ("ste", {"delay": 3, "setup": "lapq"}, "lapq: expected training that is quantized from its first step"),
        ("ste", {"batch_norm": "frozen"}, "gptq: expected a weight that is rounded as it is, got batch_norm='frozen'"),
        ("dorefa", {}, "QuantConfig.setup: gptq: .* got method 'dorefaweights', which chooses codes itself"),
        ("ste", {"distill": 0.5}, "QuantConfig.distill: expected a teacher with float weights, got the model itself"),
        ("ste", {"weight": None, "activation": None}, "gptq: expected weights to round, got weight=None"),
    ],
)
def test_settings_a_rounding_cannot_take(method, settings, match):
    config = QuantConfig.from_dict({**QuantConfig.parse(method, "w4a8").to_dict(), "setup": "gptq", **settings})
    with pytest.raises(ValueError, match=match):
        QuantController(config)
    if "distill" in settings:
        QuantController(config, teacher=causal_lm())


def test_lapq_without_a_static_range_is_refused():
    config = QuantConfig.parse("ste", "w8a8", setup=["lapq"])
    with pytest.raises(ValueError, match="lapq: expected a static range, got ranges that follow each tensor"):
        QuantController(config).prepare(causal_lm(), batches=lambda: [token_batch()])
