"""Rounding of real models: better than to nearest, exact in the export, a start for training, and the command."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_quant import QuantConfig, attach
from lightning_quant.attach import quant_layers
from lightning_quant.checkpoint import load_training_checkpoint
from lightning_quant.cli import main
from lightning_quant.export import export, verify
from lightning_quant.rounding import ROUNDINGS, round_model
from lightning_quant.rounding.data import read_text, rows
from tests.integration.processes import ROOT
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm, token_batch

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def batches(count: int = 6, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    found = [token_batch(4, seed=seed) for seed in range(count)]
    return [{**b, "labels": b["input_ids"]} if labels else b for b in found]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=32)).eval()


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("scheme", ["w3a16-g16", "w8a8"])
def test_gptq_lowers_the_output_error_of_every_layer(family, scheme):
    model = gpt2() if family == "gpt2" else causal_lm(family)
    report = round_model(model, QuantConfig.parse("ste", scheme), batches(), "gptq")
    assert set(report.errors) == {path for path, _ in quant_layers(model)}
    assert not report.nearest
    for path, (before, after) in report.errors.items():
        assert after < before, path


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_was_chosen_is_what_is_exported(rounding, tmp_path):
    model, config = causal_lm(), QuantConfig.parse("ste", "w4a16-g16")
    options = {} if rounding in ("rtn", "gptq") else {"iterations": 10}
    round_model(model, config, batches(2), rounding, **options)
    codes = {path: layer.weight_quant.stored(layer.weight)[0] for path, layer in quant_layers(model)}
    export(model, tmp_path / "out", config=config)
    report = verify(tmp_path / "out", model)
    assert report.ok, str(report)
    reader = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        x = token_batch()
        assert torch.equal(reader(**x).logits, model(**x).logits)
    assert codes


def test_training_starts_from_the_rounded_weights():
    model, config = causal_lm(), QuantConfig.parse("pege", "w3a16-g16")
    attach(model, config)
    nearest = copy.deepcopy(model)
    round_model(model, None, batches(), "gptq")
    with torch.no_grad():
        chosen = [layer.on_grid() for _, layer in quant_layers(model)]
        assert all(torch.equal(a, layer.weight) for a, (_, layer) in zip(chosen, quant_layers(model), strict=True))
        changed = [a.ne(layer.on_grid()).any() for a, (_, layer) in zip(chosen, quant_layers(nearest), strict=True)]
    assert all(changed)
    model.train()
    y = model(**batches(1)[0])
    y.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_block_losses_fall_and_gradients_weigh_them():
    def run(**options):
        model = causal_lm()
        config = QuantConfig.parse("ste", "w2a16-g16")
        report = round_model(model, config, batches(labels=True), "brecq", iterations=60, lr=0.1, **options)
        return report, model

    (weighed, a), (plain, b) = run(importance=True), run()
    for report in (weighed, plain):
        assert list(report.errors) == ["model.layers.0", "model.layers.1"]
        for before, after in report.errors.values():
            assert after < before
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_static_ranges_are_calibrated_on_the_way():
    model = causal_lm()
    report = round_model(model, QuantConfig.parse("ste", "w8a8-static"), batches(), "gptq")
    assert all(layer.input_quant.ready for _, layer in quant_layers(model))
    assert len(report.errors) == 14


def test_images_have_a_stem_before_their_blocks():
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=5))
    data = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]
    report = round_model(model, QuantConfig.parse("ste", "w3a16-channel"), data, "gptq")
    assert set(report.errors) == {path for path, _ in quant_layers(model)}
    assert any("patch_embeddings" in path for path in report.errors)
    assert all(after < before for before, after in report.errors.values())


def test_fused_experts_are_rounded_to_nearest_and_named():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, vocab_size=96, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    report = round_model(model, QuantConfig.parse("ste", "w4a16-g16"), batches(2), "gptq")
    assert len(report.nearest) == 4
    assert all("fused experts" in why for why in report.nearest.values())
    assert "to nearest: fused experts" in str(report)


def test_a_tied_weight_that_is_read_in_float_is_left_alone():
    model = causal_lm(tied=True)
    before = model.lm_head.weight.clone()
    report = round_model(model, QuantConfig.parse("ste", "w8a16", head=True), batches(2), "gptq")
    assert list(report.kept) == ["lm_head"]
    assert torch.equal(model.lm_head.weight, before)


# The command, on a directory of shards.


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 4}, vocab_size=256, num_key_value_heads=1))
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


ARGUMENTS = ("--scheme", "w4a16-g16", "--samples", "6", "--length", "24")


@pytest.mark.parametrize("rounding", ["gptq", "adaround", "qdrop"])
def test_the_command_writes_what_rounding_in_memory_does(directory, tmp_path, rounding, capsys):
    options = {} if rounding == "gptq" else {"iterations": 8}
    words = [w for name, value in options.items() for w in ("--rounding-option", f"{name}={value}")]
    out, kept = tmp_path / "out", tmp_path / "rounded"
    assert (
        main(["ptq", str(directory), str(out), *ARGUMENTS, "--rounding", rounding, "--rounded", str(kept), *words]) == 0
    )
    assert f"{rounding}: relative squared error" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rounded"]
    assert main(["verify", str(out), "--against", str(kept)]) == 0
    model = AutoModelForCausalLM.from_pretrained(directory)
    round_model(
        model, QuantConfig.parse("ste", "w4a16-g16"), rows(read_text(None), None, 256, 6, 24), rounding, **options
    )
    found = load_training_checkpoint(kept).state_dict()
    want = model.state_dict()
    assert found.keys() == want.keys()
    assert [name for name in want if not torch.equal(found[name], want[name])] == []


def start(directory: Path, out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lightning_quant.cli", "ptq", str(directory), str(out), *ARGUMENTS, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_killed_run_goes_on_after_its_last_block(directory, tmp_path):
    words = ("--rounding", "adaround", "--rounding-option", "iterations=25", "--resume")
    out = tmp_path / "a" / "out"
    journal = out.with_name(".out.rounding.json")
    for blocks in (1, 3):
        process = start(directory, out, *words)
        while process.poll() is None and not (
            journal.is_file() and len(json.loads(journal.read_text())["shards"]) >= blocks
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
    done = {p: p.stat().st_mtime_ns for p in out.with_name(".out.rounding").glob("model-block-0000[123]*")}
    assert len(done) >= 3
    straight = tmp_path / "b" / "out"
    assert main(["ptq", str(directory), str(out), *ARGUMENTS, *words]) == 0
    assert main(["ptq", str(directory), str(straight), *ARGUMENTS, *words[:-1]]) == 0
    assert contents(out) == contents(straight)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_another_run_is_not_gone_on_with(directory, tmp_path, capsys):
    work, journal = tmp_path / ".out.rounding", tmp_path / ".out.rounding.json"
    work.mkdir()
    journal.write_text(json.dumps({"fingerprint": {"rounding": "rtn"}, "shards": []}))
    assert main(["ptq", str(directory), str(tmp_path / "out"), *ARGUMENTS, "--resume"]) == 2
    assert "expected an interrupted export of the same, got one that differs in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounding", "gtpq"], "Did you mean rounding 'gptq'?"),
        (["--rounding-option", "damping"], "--rounding-option: expected NAME=VALUE, got 'damping'"),
        (["--rounding-option", "dampen=1"], "Did you mean option 'damping'?"),
        (["--samples", "100000"], "ptq: expected a text of 100000 x 24 tokens"),
        (["--samples", "0"], "ptq: expected samples and length of at least 1"),
        (["--data", "none.txt"], "none.txt"),
        (["--scheme", "w4a16-g48"], "group_size=48 does not divide"),
        (["--config", "x.yaml"], "ptq: expected --scheme or --config, got both"),
    ],
)
def test_errors_name_their_cure_and_leave_nothing(directory, tmp_path, capsys, words, message):
    assert main(["ptq", str(directory), str(tmp_path / "out"), *ARGUMENTS, *words]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_directories_that_are_none_of_a_float_model(tmp_path, capsys, directory):
    def message(model: Path, out: Path = tmp_path / "new") -> str:
        assert main(["ptq", str(model), str(out), *ARGUMENTS]) == 2
        return capsys.readouterr().err

    assert "expected a config.json of transformers" in message(tmp_path)
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "empty")
    assert "expected model.safetensors or model.safetensors.index.json, got neither" in message(tmp_path / "empty")
    assert "expected a directory that does not exist yet" in message(directory, tmp_path / "empty")
    main(["ptq", str(directory), str(tmp_path / "out"), *ARGUMENTS, "--rounding", "rtn"])
    capsys.readouterr()
    assert "expected a float model, got one that is quantized already" in message(tmp_path / "out")


def test_a_trained_model_keeps_its_learned_ranges():
    model = train_a_little(causal_lm(), QuantConfig.parse("lsq", "w4a16-g16"))
    scales = [layer.weight_quant.scale.clone() for _, layer in quant_layers(model)]
    report = round_model(model, None, batches(2), "gptq")
    assert all(
        torch.equal(s, layer.weight_quant.scale) for s, (_, layer) in zip(scales, quant_layers(model), strict=True)
    )
    assert all(after <= before for before, after in report.errors.values())
