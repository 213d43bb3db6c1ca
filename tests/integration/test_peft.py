"""QuantTrainer and export on models that PEFT wrapped: the directories are PEFT's, what ships is the merged model."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_integration import QuantTrainer, load_training_checkpoint
from lightning_quant import LayerRule, QuantConfig, attach, calibrate
from lightning_quant.attach import is_attached, quant_layers, quantizers
from lightning_quant.checkpoint import ADAPTER_FILE, CONFIG_FILE, STATE_FILE
from lightning_quant.cli import main as lightning_quant
from lightning_quant.errors import AttachError, CheckpointError
from lightning_quant.export import export, verify
from tests.integration.processes import ROOT, differing, result, run, start
from tests.integration.test_trainer import dataset, file_keys, logits, losses, make
from tests.integration.tiny import causal_lm, token_batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

W4 = QuantConfig.parse("pege", "w4a16-g32", target="transformers")
STATIC = QuantConfig.parse("lsq", "w8a8-static", target="transformers", calibration=3)
HEAD = QuantConfig.parse("lsq", "w4a16-g32", target="transformers", head=True)
TARGETS = ["q_proj", "v_proj", "up_proj"]


def adapted(base: nn.Module | None = None, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, **{"target_modules": TARGETS, **settings})
    model = get_peft_model(causal_lm() if base is None else base, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                p.normal_(std=0.05)
    return model


def train(root: Path, config: QuantConfig = W4, model: nn.Module | None = None, **settings: object) -> QuantTrainer:
    if model is None:
        model = adapted(lora_dropout=0.1, modules_to_save=["lm_head"])
    return make(root, config, model=model, save_strategy="steps", save_steps=3, **settings)


# Training


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> QuantTrainer:
    torch.manual_seed(0)
    trainer = train(tmp_path_factory.mktemp("peft"))
    trainer.train()
    trainer.save_model(str(Path(trainer.args.output_dir) / "final"))
    return trainer


def test_the_directory_is_peft_s_with_the_quantizers_beside_it(trained):
    assert sum(losses(trained)[-2:]) < sum(losses(trained)[:2])
    for name in ("final", "checkpoint-6"):
        directory = Path(trained.args.output_dir) / name
        assert {STATE_FILE, CONFIG_FILE, ADAPTER_FILE} <= {f.name for f in directory.iterdir()}
        assert not (directory / "model.safetensors").exists()
        adapted().save_pretrained(directory.parent / "plain")
        plain = set(load_file(directory.parent / "plain" / "adapter_model.safetensors"))
        found = set(load_file(directory / "adapter_model.safetensors"))
        assert found == plain | {"base_model.model.lm_head.weight"}
        reader = PeftModel.from_pretrained(causal_lm(), directory)
        assert not is_attached(reader)
        assert not torch.equal(logits(reader), logits(trained.model))
        for given in (causal_lm(), PeftModel.from_pretrained(causal_lm(), directory)):
            back = load_training_checkpoint(directory, given)
            assert torch.equal(logits(back), logits(trained.model))
            state = trained.model.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())


def test_export_of_the_wrapped_model_is_that_of_the_merged_one(trained, tmp_path, capsys):
    trained.model.train()  # dropout of the adapters must not reach the file
    trained.export(tmp_path / "out")
    assert trained.model.training
    report = verify(tmp_path / "out", trained.model)
    assert report.ok
    assert report.max_abs_diff == 0.0
    assert len(report.layers) == 14
    assert report.layers[0].path == "model.layers.0.self_attn.q_proj"
    reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reader), logits(trained.model))

    merged = copy.deepcopy(trained.model).merge_and_unload()
    assert torch.equal(logits(merged), logits(trained.model))
    export(merged, tmp_path / "merged", config=W4)
    assert same_files(tmp_path / "out", tmp_path / "merged")
    merged.save_pretrained(tmp_path / "float")
    causal_lm().save_pretrained(tmp_path / "base")
    assert file_keys(tmp_path / "float") == file_keys(tmp_path / "base")

    run = tmp_path / "run"
    shutil.copytree(Path(trained.args.output_dir) / "final", run)
    settings = json.loads((run / ADAPTER_FILE).read_text())
    (run / ADAPTER_FILE).write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "base")}))
    assert lightning_quant(["verify", str(tmp_path / "out"), "--against", str(run)]) == 0
    assert "verify max|d logits| = 0.0" in capsys.readouterr().out


def same_files(a: Path, b: Path) -> bool:
    names = sorted(f.name for f in a.iterdir())
    assert names == sorted(f.name for f in b.iterdir())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


class Stop(TrainerCallback):
    """Saves and stops."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(("config", "step"), [(W4, 4), (STATIC, 2), (STATIC, 4), (HEAD, 4)])
def test_resuming_ends_with_the_same_bits(tmp_path, config, step, caplog):
    whole = train(tmp_path / "whole", config, save_only_model=True)
    whole.train()
    cut = train(tmp_path / "cut", config, callbacks=[Stop(step)])
    cut.train()
    assert cut.state.global_step == step
    rest = train(tmp_path / "cut", config)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        rest.train(resume_from_checkpoint=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "missing keys" not in caplog.text
    assert losses(rest) == losses(whole)
    state = rest.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    trainable = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in rest.model.named_parameters() if p.requires_grad}
    assert any(n.endswith("_quant.scale") for n in trainable)


def test_a_run_of_two_processes_that_is_killed_goes_on(tmp_path):
    args = ("--lora", "--method", "lsq", "--scheme", "w4a8-static-g32")
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    run("hf_run.py", "--out", tmp_path / "whole", *args, processes=2)
    script = ROOT / "tests" / "integration" / "hf_run.py"
    assert start(script, "--out", tmp_path / "cut", *args, "--die-at", 6, processes=2).returncode
    assert [p.name for p in (tmp_path / "cut" / "run").iterdir()] == ["checkpoint-4"]
    run("hf_run.py", "--out", tmp_path / "cut", *args, "--resume", processes=2)
    whole, rest = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert whole["wrapped"] == "DistributedDataParallel"
    assert len(whole["losses"]) == 12
    assert rest["losses"] == whole["losses"]
    assert differing(whole["state"], rest["state"]) == []


def test_best_model_brings_adapters_and_quantizers_back(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if "lora_B" in name or name.endswith("scale"):
                            p.mul_(5)

    evaluation = {"eval_dataset": dataset(8, seed=1), "eval_strategy": "steps", "eval_steps": 3}
    trainer = train(tmp_path, callbacks=[Spoil()], load_best_model_at_end=True, **evaluation)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-3"
    assert torch.equal(logits(trainer.model), logits(load_training_checkpoint(best, causal_lm())))
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_damaged_or_foreign_adapters(trained, tmp_path):
    directory = Path(trained.args.output_dir) / "final"
    with pytest.raises(CheckpointError, match=r"expected the name of the base model, got .*\. Pass it: load_training"):
        load_training_checkpoint(directory)
    with pytest.raises(CheckpointError, match=r"expected adapters of this model, got .*Give the base model they were"):
        load_training_checkpoint(directory, causal_lm("opt"))
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"expected adapters of this model, got"):
        load_training_checkpoint(broken, causal_lm())
    (broken / ADAPTER_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected JSON, got"):
        load_training_checkpoint(broken)


# Export without merging


CASES = {
    "plain": {},
    "dora": {"use_dora": True},
    "biases": {"bias": "lora_only", "lora_bias": True, "target_modules": ["fc1", "q_proj"]},
    "a layer without quantizers": {"target_modules": [*TARGETS, "o_proj"]},
    "embeddings": {"target_modules": [*TARGETS, "embed_tokens"]},
    "copies": {"modules_to_save": ["lm_head", "norm"]},
    "tokens": {"trainable_token_indices": [1, 5, 7]},
}
RULE = LayerRule("*.o_proj", weight=None)


@pytest.mark.parametrize("format", ["compressed-tensors", "folded"])
@pytest.mark.parametrize("case", CASES)
def test_export_equals_merging_first(tmp_path, case, format):
    settings, rules = CASES[case], [RULE] if case == "a layer without quantizers" else []
    exact = not rules and case != "embeddings"  # beside float layers PEFT adds after the product
    model = adapted(causal_lm("opt") if case == "biases" else causal_lm(), **settings)
    for name, p in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens" in name or "lora_B" in name:
            p.data += 0.1 * torch.randn_like(p)
    config = QuantConfig.parse("ste", "w4a16-g32", rules=rules, target="transformers")
    attach(model, config)
    before = logits(model)
    export(model, tmp_path / "out", format=format, config=config)
    report = verify(tmp_path / "out", model)
    assert report.ok
    assert report.max_abs_diff == 0.0
    assert any("are merged on both sides" in note for note in report.notes) == (not exact or case == "tokens")
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, atol=0 if exact else 1e-5, rtol=0)
    export(merged, tmp_path / "merged", format=format, config=config)
    assert same_files(tmp_path / "out", tmp_path / "merged")


def test_one_of_several_adapters_and_none(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    config = QuantConfig.parse("ste", "w4a16-g32", target="transformers")
    attach(model, config)
    exported = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        export(model, tmp_path / name, config=config)
        assert verify(tmp_path / name, model).ok
        exported[name] = load_file(tmp_path / name / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight_packed"
    assert not torch.equal(exported["default"][key], exported["other"][key])
    assert torch.equal(exported["other"]["lm_head.weight"], causal_lm().lm_head.weight)
    model.set_adapter("default")
    model.merge_adapter()
    export(model, tmp_path / "merged in place", config=config)
    assert same_files(tmp_path / "default", tmp_path / "merged in place")


class Net(nn.Module):
    """Not transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_peft_around_a_module_that_is_not_transformers(tmp_path):
    model = adapted(Net(), target_modules=["first"], modules_to_save=["second"])
    attach(model, QuantConfig.parse("ste", "w4a16-g32", head=True))
    export(model, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(Net().state_dict())
    report = verify(tmp_path / "out", model, {"x": torch.randn(4, 32)})
    assert report.ok
    assert [c.path for c in report.layers] == ["first", "second"]
    assert any(True for _ in quant_layers(model))  # nothing was taken out of it


def test_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    model = adapted(Net(), target_modules=["first", "second"], lora_dropout=0.5)
    attach(model, QuantConfig.parse("ste", "w8a8-static", rules=[LayerRule("second", weight=None)]))
    x = torch.randn(4, 32)
    calibrate(model, [x])
    export(model.train(), tmp_path / "out", format="onnx", inputs=x)
    report = verify(tmp_path / "out", model, x)
    assert report.ok
    assert len(report.layers) == 1


def test_ia3_merges_too(tmp_path):
    model = get_peft_model(causal_lm(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ia3" in name:
                p.uniform_(0.5, 2)
    config = QuantConfig.parse("ste", "w4a16-g32", target="transformers")
    report = attach(model, config)
    assert not any("k_proj" in e.path for e in report.attached)
    export(model, tmp_path / "out", config=config)
    export(copy.deepcopy(model).merge_and_unload(), tmp_path / "merged", config=config)
    assert same_files(tmp_path / "out", tmp_path / "merged")


# Refused


def test_learned_prompts_have_no_weight_to_be_in(tmp_path):
    model = get_peft_model(causal_lm(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    with pytest.raises(ValueError, match=r"expected adapters that merge into weights, got .* with learned prompts"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.parametrize("settings", [{}, {"ensure_weight_tying": True}])
def test_adapters_of_a_tied_weight_cannot_merge(tmp_path, settings):
    model = adapted(causal_lm(tied=True), target_modules=["q_proj", "embed_tokens"], **settings)
    attach(model, QuantConfig.parse("ste", "w4a16-g32"))
    with pytest.raises(ValueError, match=r"embed_tokens: expected a weight of its own .* shared by .*lm_head.* untie"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_around_quantized_layers_are_refused(tmp_path):
    base = causal_lm()
    attach(base, W4)
    with pytest.raises(AttachError, match=r"q_proj: expected adapters first .*, got .* Call get_peft_model"):
        make(tmp_path, W4, model=adapted(base))


def test_a_model_with_adapters_of_its_own(tmp_path):
    """``model.add_adapter``, transformers' own way, without a PeftModel around it."""
    model = causal_lm()
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    trainer = make(tmp_path, W4, model=model, max_steps=2)
    trainer.train()
    trainer.export(tmp_path / "out")
    report = verify(tmp_path / "out", trainer.model, token_batch())
    assert report.ok
    assert report.max_abs_diff == 0.0
    assert sum(1 for _ in quantizers(trainer.model)) == 14
