"""hf-quant: a script that knows nothing of quantization, run as it is."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Trainer

from hf_integration import QuantArguments, load_training_checkpoint
from hf_integration.command import split_argv
from hf_integration.launch import main
from lightning_quant import QuantConfig
from lightning_quant.attach import is_attached
from lightning_quant.cli import main as lightning_quant
from lightning_quant.export import verify
from tests.integration.processes import ROOT, start

COMMON = """
import json, os, sys
from dataclasses import dataclass
from pathlib import Path
from datasets import Dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator
from tests.integration.tiny import causal_lm, token_rows

BASE = dict(
    per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", "1")), learning_rate=3e-3, logging_steps=1,
    report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", seed=0,
)
ROWS = Dataset.from_list(token_rows(16))
"""

PLAIN = (
    COMMON
    + '''
@dataclass
class Own:
    """The script's own flags."""
    out: str = "out"
    steps: int = 2
    resume: str = None

(own,) = HfArgumentParser(Own).parse_args_into_dataclasses()
trainer = Trainer(
    model=causal_lm(), args=TrainingArguments(output_dir=own.out, max_steps=own.steps, **BASE), train_dataset=ROWS,
    data_collator=default_data_collator,
)
trainer.train(resume_from_checkpoint=own.resume)
trainer.save_model()
if trainer.is_world_process_zero():
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    seen = {"argv": sys.argv[1:], "name": __name__, "losses": losses, "class": type(trainer).__name__}
    Path(own.out, "seen.json").write_text(json.dumps(seen))
'''
)

SUBCLASS = (
    COMMON
    + """
import helper_of_the_script

class MyTrainer(Trainer):
    def __init__(self, net, root, weight):
        super().__init__(net, TrainingArguments(output_dir=root, max_steps=2, **BASE), default_data_collator, ROWS)
        self.weight = weight
        self.called = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.called += 1
        loss = self.weight * super().compute_loss(model, inputs, False, num_items_in_batch)
        return (loss, None) if return_outputs else loss

trainer = MyTrainer(causal_lm(), sys.argv[1], 0.5)
assert isinstance(trainer, MyTrainer)
trainer.train()
assert trainer.called == 2
trainer.save_model()
print(f"weight {trainer.weight} {helper_of_the_script.WORD}")
"""
)

MODEL_INIT = (
    COMMON
    + """
trainer = Trainer(
    args=TrainingArguments(output_dir=sys.argv[1], max_steps=2, **BASE), model_init=lambda: causal_lm(),
    train_dataset=ROWS, data_collator=default_data_collator,
)
trainer.train()
trainer.save_model()
"""
)

NO_TRAINER = "import sys\nprint('hello', sys.argv[1:])\n"


@pytest.fixture
def script(tmp_path):
    """Writes a script to a directory of its own; its path is returned."""

    def write(text: str, name: str = "train.py") -> str:
        directory = tmp_path / "scripts"
        directory.mkdir(exist_ok=True)
        (directory / name).write_text(text)
        return str(directory / name)

    argv, path = list(sys.argv), list(sys.path)
    original = Trainer.__init__
    yield write
    assert sys.argv == argv
    assert sys.path == path
    assert Trainer.__init__ is original


def seen(out: Path) -> dict[str, object]:
    return json.loads((out / "seen.json").read_text())


def process(*words: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return start("-m", "hf_integration", *words, processes=processes)


def test_unmodified_script_trains_quantized_and_sees_only_its_own_flags(tmp_path, script):
    out = tmp_path / "run"
    own = ["--out", str(out), "--steps", "3"]
    words = [
        "--quant",
        "pege",
        *own[:2],
        "--quant_scheme=w4a16-g32",
        *own[2:],
        "--quant_export",
        str(tmp_path / "int4"),
    ]
    assert main([script(PLAIN), *words]) == 0
    found = seen(out)
    assert found["argv"] == own
    assert found["name"] == "__main__"
    assert len(found["losses"]) == 3
    model = load_training_checkpoint(out)
    assert is_attached(model)
    assert verify(tmp_path / "int4", model).ok


def test_quant_none_is_the_script_alone(tmp_path, script, capsys, monkeypatch):
    path = script(PLAIN)
    assert main([path, "--out", str(tmp_path / "none"), "--quant", "none", "--quant_export", str(tmp_path / "x")]) == 0
    assert "nothing will be exported" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main([path, "--out", str(tmp_path / "lsq"), "--quant=lsq", "--quant-scheme=w2a16-g32"]) == 0
    monkeypatch.setattr(sys, "argv", [path, "--out", str(tmp_path / "alone")])
    runpy.run_path(path, run_name="__main__")
    monkeypatch.undo()
    none, alone, quantized = (seen(tmp_path / n) for n in ("none", "alone", "lsq"))
    assert none["losses"] == alone["losses"]
    assert none["class"] == "Trainer"
    assert quantized["losses"] != alone["losses"]
    assert not list((tmp_path / "none").glob("quant_*"))


def test_a_trainer_subclass_keeps_its_own_constructor_and_loss(tmp_path, script, capsys):
    script("WORD = 'beside'\n", "helper_of_the_script.py")
    assert main([script(SUBCLASS), "--quant", "dsq", "--quant_scheme", "w4a16-g32", str(tmp_path / "run")]) == 0
    assert "weight 0.5 beside" in capsys.readouterr().out
    assert is_attached(load_training_checkpoint(tmp_path / "run"))
    sys.modules.pop("helper_of_the_script", None)


def test_model_init(tmp_path, script):
    assert main([script(MODEL_INIT), str(tmp_path / "run"), "--quant", "lsq", "--quant_scheme", "w4a16-g32"]) == 0
    assert is_attached(load_training_checkpoint(tmp_path / "run"))


def test_options_of_the_method_arrive(tmp_path, script):
    words = ["--quant_option", "theta=channel", "initial=5e-1", "--quant_option", "lam={curve: constant, end: 1e-2}"]
    flags = ["--quant", "pege", "--quant_scheme", "w4a16-g32", *words]
    assert main([script(PLAIN), *flags, "--out", str(tmp_path / "run")]) == 0
    data = json.loads((tmp_path / "run" / "quant_config.json").read_text())
    assert data["options"] == {"theta": "channel", "initial": 0.5, "lam": {"curve": "constant", "end": 0.01}}


# What goes where


def test_split_keeps_the_script_s_words_in_order(tmp_path):
    path = tmp_path / "s.py"
    path.touch()
    words = [
        "run",
        "-x",
        "-0.5",
        "--quant",
        "pege",
        "key=value",
        "--flag",
        "--quant-scheme=w8a8",
        "a b",
        "--",
        "--quant",
    ]
    found = split_argv([str(path), *words])
    assert found.script == path
    assert (found.quant.quant, found.quant.quant_scheme) == ("pege", "w8a8")
    assert found.argv == ["run", "-x", "-0.5", "key=value", "--flag", "a b", "--", "--quant"]
    assert found.taken == {"quant", "quant_scheme"}


def test_flags_before_the_script_leave_it_all_that_follows(tmp_path):
    path = tmp_path / "s.py"
    path.touch()
    theirs = ["--quant", "8", "--quant_scheme=x", "--quantx", "a=b"]
    options = ["--quant_option", "theta=channel", "initial=0.5"]
    found = split_argv(["--quant", "pege", *options, str(path), *theirs])
    assert (found.quant.quant, found.quant.quant_option) == ("pege", ["theta=channel", "initial=0.5"])
    assert found.script == path
    assert found.argv == theirs
    assert not found.taken


def test_flags_that_only_begin_like_ours_are_the_script_s(tmp_path):
    path = tmp_path / "s.py"
    path.touch()
    theirs = ["--quantile", "0.3", "--quantization_bits=4", "--quantize", "--quantity", "2", "--quantum"]
    found = split_argv([str(path), *theirs[:3], "--quant", "lsq", *theirs[3:]])
    assert found.argv == theirs
    assert found.quant == QuantArguments(quant="lsq")


SETTINGS = {
    "quant": "pege",
    "quant_scheme": "w4a16-g32",
    "quant_calibration": 7,
    "quant_distill": 0.5,
    "quant_option": {"theta": "channel", "initial": 0.5, "lam": {"curve": "linear", "start": 0, "end": 1e-3}},
    "quant_export": None,
    "output_dir": "out",
    "quantile": 0.3,
}


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_settings_in_the_script_s_file(tmp_path, suffix):
    script, file = tmp_path / "s.py", tmp_path / f"args{suffix}"
    script.touch()
    file.write_text(json.dumps(SETTINGS) if suffix == ".json" else yaml.safe_dump(SETTINGS))
    found = split_argv([str(script), str(file)])
    assert found.argv == [str(file)]
    assert found.taken == {k for k in SETTINGS if k.startswith("quant") and SETTINGS[k] is not None} - {"quantile"}
    assert found.quant.to_config() == QuantConfig.parse(
        "pege",
        "w4a16-g32",
        calibration=7,
        distill={"weight": 0.5},
        theta="channel",
        initial=0.5,
        lam={"curve": "linear", "start": 0, "end": 1e-3},
    )
    over = split_argv([str(script), str(file), "--quant_scheme", "w8a8", "--quant_option", "initial=0.25"])
    assert over.quant.quant_scheme == "w8a8"
    assert over.quant.to_config().options["initial"] == 0.25
    assert split_argv(["--quant", "lsq", str(script), str(file)]).quant == QuantArguments(quant="lsq")
    beside = split_argv([str(script), str(file), "--more", "--quant", "lsq"])  # the script reads no file then
    assert beside.quant == QuantArguments(quant="lsq")


def test_mistakes_in_the_script_s_file(tmp_path, script, capsys):
    path, file = script("raise SystemError('the script ran')"), tmp_path / "args.json"
    for data, message in (
        (
            {"quant": "pege", "quant_schem": "w8a8"},
            r"args\.json: expected .* Did you mean setting 'quant_scheme'",
        ),
        ({"quant": "peg"}, "Did you mean method 'pege'"),
        ({"output_dir": "out"}, "got neither"),
    ):
        file.write_text(json.dumps(data))
        assert main([path, str(file)]) == 2
        assert re.search(message, capsys.readouterr().err)
    file.write_text("{")
    with pytest.raises(SystemError, match="the script ran"):
        main(["--quant", "pege", path, str(file)])


def test_arguments_file_beside_the_command_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "s.py").touch()
    (tmp_path / "s.args").write_text("--quant lsq")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "s.py")])
    assert split_argv([str(tmp_path / "s.py"), "--quant", "ste"]).quant == QuantArguments(quant="ste")


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_own_help(capsys, words):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: hf-quant SCRIPT")
    for flag in ("--quant ", "--quant_scheme", "--quant_export", "--quant_option", "pege_replace"):
        assert flag in out


def test_help_behind_a_script_is_the_script_s(tmp_path, script, capsys):
    with pytest.raises(SystemExit) as stop:
        main([script(PLAIN), "--quant", "pege", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--steps" in out
    assert "--quant_scheme" not in out


# Mistakes


BAD = {
    "--quant pege --quantx 3": r"hf-quant: expected one of .*, got 'quantx'\. Did you mean flag 'quant'",
    "--quant pege --quant_schem w8a8": "Did you mean flag 'quant_scheme'",
    "--quant peg": "Did you mean method 'pege'",
    "--quant pege --quant_scheme w99": "expected the form",
    "--quant pege --quant_option thet=group": "Did you mean option 'theta'",
    "--quant pege --quant_export .": "expected a directory that does not exist yet",
    "--quant_scheme w8a8": r"expected --quant METHOD or --quant_config FILE, got neither\. --quant is one of ",
    "": "got neither",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_flags_are_one_line_and_status_2_before_the_script_runs(tmp_path, script, capsys, words):
    path = script("raise SystemError('the script ran')")
    assert main([path, *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hf-quant: ")
    assert re.search(BAD[words], err)


def test_flag_without_its_value(script, capsys):
    with pytest.raises(SystemExit) as stop:
        main([script(NO_TRAINER), "--quant"])
    assert stop.value.code == 2
    assert "--quant: expected one argument" in capsys.readouterr().err


def test_no_script(tmp_path, capsys):
    assert main(["--quant", "pege"]) == 2
    assert "expected a Python script, got none. hf-quant SCRIPT --quant pege" in capsys.readouterr().err
    assert main(["--quant", "pege", "--out", "x"]) == 2
    assert "expected a Python script, got '--out'" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.py"), "--quant", "pege"]) == 2
    assert "missing.py" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "sys.exit()"])
def test_script_without_a_trainer(script, capsys, end):
    assert main([script(NO_TRAINER + end), "--quant", "pege", "word"]) == 2
    out, err = capsys.readouterr()
    assert out == "hello ['word']\n"
    assert err.count("\n") == 1
    assert "expected a script that builds a transformers.Trainer, got none built. In a hand-written loop use" in err
    assert main([script(NO_TRAINER), "--quant", "none"]) == 0


def test_exit_status_and_exceptions_of_the_script_are_its_own(script):
    with pytest.raises(SystemExit) as stop:
        main([script("import sys; sys.exit(5)"), "--quant", "pege"])
    assert stop.value.code == 5
    with pytest.raises(ZeroDivisionError):
        main([script("1 / 0"), "--quant", "pege"])


def test_model_that_the_scheme_does_not_fit(tmp_path, script, capsys):
    assert main([script(PLAIN), "--quant", "pege", "--quant_scheme", "w4a16-g48", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "group_size=48 does not divide in_features=64" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_resuming_from_a_float_checkpoint(tmp_path, script, capsys):
    path = script(PLAIN)
    assert main([path, "--quant", "none", "--out", str(tmp_path / "float")]) == 0
    words = ["--quant", "pege", "--quant_scheme", "w4a16-g32", "--out", str(tmp_path / "q"), "--resume"]
    assert main([path, *words, str(tmp_path / "float")]) == 2
    assert "expected a training directory with quant_config.json, got none. Point at" in capsys.readouterr().err


def test_export_without_training_is_said(tmp_path, script, capsys):
    path = script(PLAIN.replace("trainer.train(", "(lambda **_: None)("))
    words = ["--quant", "pege", "--quant_scheme", "w4a16-g32", "--out", str(tmp_path), "--quant_export"]
    assert main([path, *words, str(tmp_path / "int4")]) == 2
    assert "expected a call of Trainer.train() before the export" in capsys.readouterr().err


OWN_FLAG = """
import argparse, sys
from transformers import HfArgumentParser, Trainer, TrainingArguments
parser = argparse.ArgumentParser()
parser.add_argument("--quant", type=int, default=8)
own, rest = parser.parse_known_args()
print("bits", own.quant, rest)
"""

QUANTIZES = (
    COMMON
    + """
from hf_integration import QuantTrainer
from lightning_quant import QuantConfig
args = TrainingArguments(output_dir=sys.argv[1], max_steps=2, **BASE)
QuantTrainer(model=causal_lm(), args=args, train_dataset=ROWS, quant=QuantConfig.parse("lsq", "w4a16-g32"))
"""
)


def test_a_flag_that_the_script_has_too(tmp_path, script, capsys):
    path = script(OWN_FLAG)
    assert main([path, "--quant", "pege"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "expected a script that leaves --quant* to hf-quant, got one with --quant of its own. Put ours before" in err
    assert main(["--quant", "pege", path, "--quant", "4"]) == 2
    out, err = capsys.readouterr()
    assert out == "bits 4 []\n"
    assert "none built" in err
    assert main(["--quant", "none", path, "--quant", "4"]) == 0


def test_a_script_that_quantizes_by_itself(tmp_path, script, capsys):
    assert main([script(QUANTIZES), str(tmp_path / "run"), "--quant", "pege"]) == 2
    assert (
        "expected trainers in float, got QuantTrainer. Run it with python, without hf-quant." in capsys.readouterr().err
    )
    assert main([script(QUANTIZES), str(tmp_path / "run"), "--quant", "none"]) == 0


def test_an_export_that_cannot_be_is_refused_before_training(tmp_path, script, capsys):
    path = script(PLAIN)
    words = ["--quant", "ste", "--quant_scheme", "w4a8-g32-asym", "--out", str(tmp_path / "run"), "--quant_export"]
    assert main([path, *words, str(tmp_path / "int4")]) == 2
    out, err = capsys.readouterr()
    assert (
        "hf-quant: --quant_export: model.layers.0.self_attn.q_proj (format='compressed-tensors'): expected symm" in err
    )
    assert "train_loss" not in out
    assert main([path, *words, str(tmp_path / "folded"), "--quant_format", "folded"]) == 0


# In processes of their own


def test_module_form_and_the_example_script(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"line {i} of a text about {i % 7} things" for i in range(400)))
    own = ["--data", text, "--hidden_size", 64, "--num_hidden_layers", 1, "--vocab_size", 300, "--block_size", 32]
    own += ["--output_dir", tmp_path / "run", "--max_steps", 2, "--do_train", "--do_eval", "--report_to", "none"]
    flags = ["--quant", "pege", "--quant_scheme", "w4a16-g32", "--quant_export", tmp_path / "int4"]
    done = process(ROOT / "examples" / "causal_lm.py", *flags, *own, "--use_cpu", "--disable_tqdm", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "7 quantized layers" in done.stdout
    assert "eval_loss" in done.stdout
    assert lightning_quant(["verify", str(tmp_path / "int4"), "--against", str(tmp_path / "run")]) == 0
    assert (tmp_path / "int4" / "tokenizer.json").is_file()


def test_module_form_reports_a_bad_flag(script):
    done = process(script(NO_TRAINER), "--quant", "pgee")
    assert done.returncode == 2
    assert "Did you mean method 'pege'" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes(tmp_path, script):
    path = script(PLAIN)
    flags = ["--quant", "pege", "--quant_scheme", "w4a16-g32"]
    done = process(
        path, *flags, "--out", tmp_path / "two", "--quant_export", tmp_path / "int4", "--steps", 3, processes=2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("quantized layers") == 1
    assert main([path, *flags, "--out", str(tmp_path / "one"), "--steps", "3"]) == 0
    assert seen(tmp_path / "two")["losses"] == pytest.approx(seen(tmp_path / "one")["losses"], rel=1e-3)
    model = load_training_checkpoint(tmp_path / "two")
    assert verify(tmp_path / "int4", model).ok
    one = load_training_checkpoint(tmp_path / "one").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.state_dict()[name], one[name], rtol=1e-3, atol=2e-3)
