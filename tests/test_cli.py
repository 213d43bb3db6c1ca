"""The lightning-quant command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_quant import QuantConfig, attach
from lightning_quant.attach import without_quantizers
from lightning_quant.checkpoint import save_quant_state
from lightning_quant.cli import main
from lightning_quant.export import export
from tests.integration.test_export import train_a_little
from tests.integration.tiny import causal_lm

CONFIG = QuantConfig.parse("pege", "w4a16-g32")


def write_training_directory(path: Path, config: QuantConfig = CONFIG) -> nn.Module:
    """What a quantized Trainer writes."""
    model = train_a_little(causal_lm(), config)
    weights, mine = without_quantizers(model.state_dict(), model)
    model.save_pretrained(path, state_dict=weights)
    save_quant_state(path, mine, config)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    torch.manual_seed(0)
    write_training_directory(path)
    return path


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    path = trained.parent / "int4"
    assert main(["export", str(trained), str(path)]) == 0
    return path


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """lightning-quant in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(
        [sys.executable, "-m", "lightning_quant.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )


def test_export_then_verify_in_a_process_of_its_own(tmp_path, trained, capsys):
    assert main(["export", str(trained), str(tmp_path / "int4")]) == 0
    out, err = capsys.readouterr()
    assert "no tokenizer there" in err
    assert str(tmp_path / "int4") in out
    done = command("verify", tmp_path / "int4", "--against", trained)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("EQUAL")
    assert "verify max|d logits| = 0.0" in done.stdout


def test_verify_as_json(trained, exported, capsys):
    assert main(["verify", str(exported), "--against", str(trained), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is True
    assert data["max_abs_diff"] == 0.0
    assert data["first_difference"] is None
    assert len(data["layers"]) == 14


def test_folded_export(tmp_path, trained, capsys):
    assert main(["export", str(trained), str(tmp_path / "folded"), "--format", "folded"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "folded" / "config.json").read_text())
    assert main(["verify", str(tmp_path / "folded"), "--against", str(trained)]) == 0
    assert "(folded)" in capsys.readouterr().out


def test_verify_of_a_changed_export_is_status_1_and_names_the_layer(tmp_path, trained, exported, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(exported, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight_packed"].view(-1)[:1].bitwise_xor_(1)
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(bad), "--against", str(trained)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("DIFFERENT")
    assert "first difference: model.layers.1.self_attn.v_proj" in out
    # A tolerance is for logits; integers that differ are never equal.
    assert main(["verify", str(bad), "--against", str(trained), "--tolerance", "1e9"]) == 1


def test_verify_against_another_training_is_status_1(tmp_path, exported):
    other = QuantConfig.parse("lsq", "w4a16-g32")
    write_training_directory(tmp_path / "other", other)
    assert main(["verify", str(exported), "--against", str(tmp_path / "other")]) == 1


def truncated(directory: Path, name: str) -> None:
    file = directory / name
    file.write_bytes(file.read_bytes()[:-50])


SIDES = {
    "training state": ("training", "quant_state.safetensors", "quant_state.safetensors: expected a whole safetensors"),
    "training config": ("training", "quant_config.json", "quant_config.json: expected JSON"),
    "training weights": ("training", "model.safetensors", "expected whole weight files"),
    "export weights": ("export", "model.safetensors", "model.safetensors: expected a whole safetensors file"),
    "training model": ("training", "config.json", "expected a config.json of transformers beside the weights"),
    "export config": ("export", "config.json", "expected a whole JSON file"),
}


@pytest.mark.parametrize("name", SIDES)
def test_verify_of_something_damaged_is_status_2_and_one_line(tmp_path, trained, exported, capsys, name):
    which, file, message = SIDES[name]
    paths = {"training": tmp_path / "training", "export": tmp_path / "export"}
    shutil.copytree(trained, paths["training"])
    shutil.copytree(exported, paths["export"])
    truncated(paths[which], file)
    assert main(["verify", str(paths["export"]), "--against", str(paths["training"])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("lightning-quant verify: ")
    assert message in last


def test_export_of_something_damaged_writes_nothing(tmp_path, trained, capsys):
    shutil.copytree(trained, tmp_path / "run")
    truncated(tmp_path / "run", "model.safetensors")
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "expected whole weight files" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("field", ["version", "weight", "mehtod"])
def test_config_of_another_release_or_hand(tmp_path, trained, capsys, field):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "quant_config.json"
    data = json.loads(file.read_text())
    data[field] = 99
    file.write_text(json.dumps(data))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert f"{file}" in capsys.readouterr().err


BAD = {
    "no training directory": (
        ["export", "{root}/none", "{root}/out"],
        "expected a training directory with quant_config",
    ),
    "existing directory": (
        ["export", "{run}", "{root}"],
        "expected a directory that does not exist yet, got an existing",
    ),
    "unknown format": (["export", "{run}", "{root}/out", "--format", "foldd"], "Did you mean format 'folded'"),
    "no export": (["verify", "{root}/none", "--against", "{run}"], "expected an export, got no such directory"),
    "not an export": (["verify", "{root}", "--against", "{run}"], "expected a whole safetensors file"),
    "not a training": (["verify", "{int4}", "--against", "{root}"], "expected a training directory with quant_config"),
    "an export as training": (["verify", "{int4}", "--against", "{int4}"], "lightning-quant verify: "),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_status_2(tmp_path, trained, exported, capsys, name):
    words, message = BAD[name]
    known = {"root": tmp_path, "run": trained, "int4": exported}
    assert main([w.format(**known) for w in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [[], ["verfy"], ["verify", "x"], ["export", "x"], ["verify", "x", "--tolerance", "a"]]
)
def test_usage_errors_are_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: lightning-quant" in capsys.readouterr().err


def test_model_outside_transformers_is_named(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(32, 8))
    attach(model, CONFIG)
    (tmp_path / "run").mkdir()
    weights, mine = without_quantizers(model.state_dict(), model)
    save_file(weights, tmp_path / "run" / "model.safetensors")
    save_quant_state(tmp_path / "run", mine, CONFIG)
    export(model, tmp_path / "out", config=CONFIG)
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "run")]) == 2
    assert "expected a config.json of transformers beside the weights, got" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m lightning_quant.cli methods | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("method ")
    assert done.stderr == ""
