"""hf-quant in front of scripts written as the stock examples are, none of which has heard of quantization."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import nn

from hf_integration import load_training_checkpoint
from hf_integration.launch import main
from lightning_quant import LayerRule, QuantConfig
from lightning_quant.attach import quantizers
from lightning_quant.checkpoint import STATE_FILE
from lightning_quant.export import verify
from tests.integration.processes import ROOT, differing, start

SCRIPTS = ROOT / "tests" / "integration" / "scripts"
COMMON = (
    "--max_steps 3 --per_device_train_batch_size 4 --logging_steps 1 --report_to none --use_cpu --disable_tqdm true"
)
COMMON += " --save_strategy steps --save_steps 2"
BOTH, ALL = "--do_train --do_eval", "--do_train --do_eval --do_predict"
W4 = ["--quant", "pege", "--quant_scheme", "w4a16-g32"]
FOLDED = ["--quant_format", "folded"]
CASES = {
    "clm": (BOTH, W4),
    "mlm": (BOTH, W4),
    "text_classification": ("--rare 3", W4),
    "token_classification": (f"{BOTH} --of another parser", W4),
    "question_answering": (ALL, W4),
    "summarization": (f"{ALL} --predict_with_generate --generation_max_length 5", [*W4, *FOLDED]),
    "image_classification": ("", ["--quant", "lsq", "--quant_scheme", "w4a8", *FOLDED]),
    "speech_recognition": (BOTH, ["--quant", "dsq", "--quant_scheme", "w8a8", *FOLDED]),
}
IDS = torch.arange(3, 13).repeat(2, 1)
INPUTS = {
    "summarization": {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
    "image_classification": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
    "speech_recognition": {"input_values": torch.linspace(-1, 1, 800).sin().reshape(2, 400)},
}


@pytest.fixture(autouse=True)
def _modules():
    yield
    sys.modules.pop("trainer_of_qa", None)


def words(name: str, out: Path, *more: object) -> list[str]:
    return [
        str(SCRIPTS / f"{name}.py"),
        "--output_dir",
        str(out),
        *COMMON.split(),
        *CASES[name][0].split(),
        *map(str, more),
    ]


def read(out: Path) -> nn.Module:
    """Plain ``from_pretrained`` of what was saved."""
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(out).architectures[0])
    model, info = kind.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("name", CASES)
def test_trains_evaluates_saves_and_exports(tmp_path, name):
    out = tmp_path / "out"
    assert main(words(name, out, *CASES[name][1], "--quant_export", tmp_path / "low")) == 0
    (state_file,) = out.glob("checkpoint-3/trainer_state.json")
    log = json.loads(state_file.read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert all("quant_error" in entry for entry in log if "loss" in entry)
    results = json.loads((out / "eval_results.json").read_text())
    assert math.isfinite(results["eval_loss"])

    assert main(words(name, tmp_path / "float", "--quant", "none")) == 0
    assert list(load_file(out / "model.safetensors")) == list(load_file(tmp_path / "float" / "model.safetensors"))
    assert json.loads((tmp_path / "float" / "eval_results.json").read_text()).keys() == results.keys()
    assert {f.name for f in out.iterdir()} - {f.name for f in (tmp_path / "float").iterdir()} == {
        "quant_config.json",
        STATE_FILE,
    }
    plain, trained = read(out), load_training_checkpoint(out)
    state = trained.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert sum(1 for _ in quantizers(trained)) >= 13
    report = verify(tmp_path / "low", trained, INPUTS.get(name, {"input_ids": IDS}))
    assert report.ok, report
    assert report.max_abs_diff == 0.0


@pytest.mark.parametrize("name", ["clm", "question_answering", "summarization", "speech_recognition"])
def test_resumes_to_the_same_bits(tmp_path, name):
    quant = CASES[name][1]
    assert main(words(name, tmp_path / "whole", *quant)) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert main(words(name, tmp_path / "rest", *quant, "--resume_from_checkpoint", checkpoint)) == 0
    for file in ("model.safetensors", STATE_FILE):
        before, whole, rest = (load_file(d / file) for d in (checkpoint, tmp_path / "whole", tmp_path / "rest"))
        assert differing(whole, rest) == []
        assert differing(before, whole) != []
    scores = [json.loads((tmp_path / run / "eval_results.json").read_text())["eval_loss"] for run in ("whole", "rest")]
    assert scores[0] == scores[1]


def settings(out: Path, **more: object) -> dict[str, object]:
    """The words above as a file of settings, ours among them."""
    common = {"output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none"}
    common |= {"use_cpu": True, "disable_tqdm": True, "do_train": True, "do_eval": True}
    return {**common, "quant": "pege", "quant_scheme": "w4a16-g32", "quant_option": {"theta": "channel"}, **more}


def test_json_file_with_settings_of_both(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(settings(tmp_path / "out", model_type="mistral")))
    assert main([str(SCRIPTS / "clm.py"), str(tmp_path / "args.json"), "--quant_export", str(tmp_path / "low")]) == 0
    trained = load_training_checkpoint(tmp_path / "out")
    assert type(trained).__name__ == "MistralForCausalLM"
    assert {q.spec.bits for _, q in quantizers(trained)} == {4}
    assert json.loads((tmp_path / "out" / "quant_config.json").read_text())["options"] == {"theta": "channel"}
    assert verify(tmp_path / "low", trained).ok
    assert (
        main([str(SCRIPTS / "clm.py"), str(tmp_path / "args.json"), "--quant", "none"]) == 0
    )  # still not the script's


def test_yaml_file_with_settings_of_both(tmp_path):
    file = tmp_path / "args.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "out", mlm_probability=0.5, quant_scheme="w8a8")))
    assert main([str(SCRIPTS / "mlm.py"), str(file)]) == 0
    assert {q.spec.bits for _, q in quantizers(load_training_checkpoint(tmp_path / "out"))} == {8}


def test_trainer_that_makes_its_own_model(tmp_path, capsys):
    own = [str(SCRIPTS / "own_model.py"), "--quantile", "0.25", str(tmp_path / "out")]
    assert main([*own, *W4, *FOLDED, "--quant_export", str(tmp_path / "low")]) == 0
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_quantile"] == 0.25
    trained = load_training_checkpoint(tmp_path / "out")
    assert sum(1 for _ in quantizers(trained)) == 8
    assert verify(tmp_path / "low", trained).ok
    assert "8 quantized layers" in capsys.readouterr().out


def test_what_the_format_cannot_say_is_refused_before_training_and_excluded_by_a_rule(tmp_path, capsys):
    low = ["--quant_export", tmp_path / "low"]
    assert main(words("image_classification", tmp_path / "out", *W4, *low)) == 2
    err = capsys.readouterr().err
    assert "patch_embeddings.projection (format='compressed-tensors'): expected a Linear layer, got QuantConv2d" in err
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    rules = [LayerRule("*.projection", weight=None)]
    QuantConfig.parse("pege", "w4a16-g32", rules=rules).to_yaml(tmp_path / "quant.yaml")
    flags = ["--quant_config", tmp_path / "quant.yaml", *low]
    assert main(words("image_classification", tmp_path / "out", *flags)) == 0
    report = verify(tmp_path / "low", load_training_checkpoint(tmp_path / "out"), INPUTS["image_classification"])
    assert report.ok


def test_a_module_beside_the_script_is_found_from_anywhere(tmp_path):
    done = start("-m", "hf_integration", *words("question_answering", Path("out"), *W4), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "14 quantized layers" in done.stdout
    assert (tmp_path / "out" / STATE_FILE).is_file()
    assert len(json.loads((tmp_path / "out" / "answers.json").read_text())) == 8
