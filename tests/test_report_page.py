"""The parts of a report's page: figures by hand and by oracle, logs, names from files, what directories hold."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboardX import SummaryWriter
from torch import nn

from lightning_quant import ESTIMATORS, QuantConfig, attach
from lightning_quant.attach import quant_layers
from lightning_quant.cli import main
from lightning_quant.errors import CheckpointError
from lightning_quant.report_page.command import _named
from lightning_quant.report_page.evaluation import compared
from lightning_quant.report_page.events import read_events
from lightning_quant.report_page.find import find_sources
from lightning_quant.report_page.history import read_history
from lightning_quant.report_page.html import clean, text
from lightning_quant.report_page.layers import LayerFigures, measure_model, with_logged
from lightning_quant.report_page.sensitivity_file import read_sensitivity
from lightning_quant.report_page.sizes import of_layers, stored_tensors
from lightning_quant.report_page.write import write_page
from lightning_quant.sensitivity.result import Sensitivity
from tests.report_pages import Page

EVIL = "x</td><script>alert(1)</script><img src=x onerror=alert(2)>\"' $\\frac{ & \u202e\x07.body"


def linear(weight: torch.Tensor, scheme: str, method: str = "ste", **settings: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    attach(model, QuantConfig.parse(method, scheme, **settings))
    return model


def test_figures_of_a_layer_by_hand():
    """Step 0.5 and codes -2..1: 0.9 and -1.6 lie beyond half a step more, 0.2 rounds to 0, nothing has code -1."""
    model = linear(torch.tensor([[0.5, 0.2, 0.9, -1.6]]), "w2a16-channel")
    with torch.no_grad():
        model[0].weight_quant.scale.fill_(0.5)
    (found,) = measure_model(model).layers
    noise = 0.2**2 + 0.4**2 + 0.6**2
    signal = 0.5**2 + 0.2**2 + 0.9**2 + 1.6**2
    assert found.name == "0"
    assert found.error == pytest.approx(noise / signal, rel=1e-6)
    assert found.snr == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    assert found.clip == 0.5
    assert found.used == 0.75
    assert (found.numbers, found.float_bytes, found.stored) == (4, 16, 3)  # four codes of 2 bits, a scale of 16
    assert found.bits == 6
    grid = found.histogram
    assert grid is not None
    assert grid.levels == [-2, -1, 0, 1]
    assert grid.after == [0.25, 0, 0.25, 0.5]
    places = {round((u - grid.low) / grid.width - 0.5): u for u in (1.0, 0.4, 1.8, -3.2)}
    assert {i for i, share in enumerate(grid.before) if share} == set(places)
    assert sum(grid.before) == pytest.approx(1)


def test_a_weight_that_lies_on_its_grid_has_no_error():
    model = linear(torch.tensor([[0.5, 1.0, -1.0, 0.0]]), "w4a16-channel")
    with torch.no_grad():
        model[0].weight_quant.scale.fill_(0.5)
    (found,) = measure_model(model).layers
    assert (found.error, found.snr, found.clip) == (0, math.inf, 0)


@pytest.mark.parametrize("method", ESTIMATORS)
def test_error_and_clip_are_those_that_training_logs(method):
    """Of every method on its own grid: measured by the page, and by the quantizer in a forward of evaluation."""
    torch.manual_seed(0)
    model = linear(torch.randn(6, 128) * 0.3, ESTIMATORS[method].about.scheme, method)
    ((path, layer),) = quant_layers(model.eval())
    (found,) = measure_model(model).layers
    layer.weight_quant.measuring = True
    with torch.no_grad():
        layer.weight_quant(layer.weight)
    assert found.name == path
    assert found.error == pytest.approx(float(layer.weight_quant.measured["error"]), rel=1e-4, abs=1e-9)
    assert found.clip == pytest.approx(float(layer.weight_quant.measured["clip"]), abs=1e-7)
    assert 0 < found.used <= 1
    if found.histogram is not None:
        assert sum(found.histogram.after) == pytest.approx(1, abs=1e-6)
        assert 0.5 < sum(found.histogram.before) <= 1 + 1e-6


@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a16-g32-asym", "nf4", "fp8", "w8a16", "w1.58a16", "mxfp4", "nvfp4a16"]
)
def test_grids_of_every_kind(scheme):
    torch.manual_seed(0)
    weight = torch.randn(64, 128) * 0.1
    model = linear(weight, scheme)
    (found,) = measure_model(model).layers
    rounded = model[0].weight_quant.on_grid(model[0].weight.detach())
    ratio = float((weight - rounded).double().square().sum() / weight.double().square().sum())
    assert found.error == pytest.approx(ratio, rel=1e-5)
    grid = found.histogram
    assert grid is not None
    assert len(grid.levels) == len(grid.after)
    middle = sum(share * (grid.low + grid.width * (i + 0.5)) for i, share in enumerate(grid.before))
    after = sum(share * level for share, level in zip(grid.after, grid.levels, strict=True))
    assert middle == pytest.approx(after, abs=0.05 * (grid.levels[-1] - grid.levels[0]))


def test_sizes_belong_to_the_layer_they_are_stored_under(tmp_path):
    tensors = {"a.b.weight_packed": torch.zeros(4, 3, dtype=torch.int32), "a.b.weight_scale": torch.zeros(4, 1)}
    tensors |= {"a.b.bias": torch.zeros(4), "a.bb.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = stored_tensors(tmp_path)
    assert found["a.bb.weight"] == (8, [2, 2])
    assert of_layers(found, ["a.b", "a.bb", "c"]) == {"a.b": 48 + 16, "a.bb": 8}
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(CheckpointError, match="expected a safetensors file"):
        stored_tensors(tmp_path)


# Logs


def test_event_files_are_read_as_tensorboard_writes_them(tmp_path):
    with SummaryWriter(str(tmp_path), write_to_disk=True) as writer:
        for step in (0, 5, 300):
            writer.add_scalar("quant/lam", step / 7, step)
        writer.add_text("hparams", "no scalar")
        writer.add_histogram("weights", torch.arange(9.0).numpy(), 3)
    (file,) = tmp_path.glob("events*")
    found = read_events(file)
    assert [step for step, _ in found["quant/lam"]] == [0, 5, 300]
    assert [value for _, value in found["quant/lam"]] == pytest.approx([0, 5 / 7, 300 / 7])
    assert set(found) == {"quant/lam"}
    data = file.read_bytes()
    for cut in (1, 13, 40):  # a run that was killed while it wrote
        file.write_bytes(data[: len(data) // 2 + cut])
        assert set(read_events(file)) <= {"quant/lam"}
    file.write_bytes(b"\xff" * 200)
    assert read_events(file) == {}


def test_names_in_logs_are_told_apart(tmp_path):
    names = ["quant/lam", "quant/head/weight_error", "quant/encoder/flips", "quant/encoder/error", "val_loss", "epoch"]
    names += ["quant/encoder/fc.0/weight_error", "quant/flips", "lr-SGD"]
    lines = [",".join(["step", *names]), "4," + ",".join("123456789"), "9,nan,,x,,7,,,,", "2,3,,,,,,,,"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = read_history(tmp_path / "metrics.csv")
    assert found.run == {"val_loss": [(4, 5.0), (9, 7.0)], "lr-SGD": [(4, 9.0)]}
    assert found.quant == {
        "lam": [(2, 3.0), (4, 1.0)],
        "flips": [(4, 8.0)],
        "encoder: flips": [(4, 3.0)],
        "encoder: error": [(4, 4.0)],
    }
    assert found.layers == {"weight_error": {"head": [(4, 2.0)], "encoder.fc.0": [(4, 7.0)]}}
    assert found.last("weight_error") == {"head": 2.0, "encoder.fc.0": 7.0}
    rows = with_logged([LayerFigures("head", error=0.5), LayerFigures("encoder.fc.0", stored=9)], found)
    assert [(f.name, f.error, f.stored, f.logged) for f in rows] == [
        ("encoder.fc.0", 7.0, 9, True),
        ("head", 0.5, None, False),
    ]


def test_trainer_state_is_read_and_a_damaged_one_named(tmp_path):
    file = tmp_path / "trainer_state.json"
    rows = [{"step": 1, "loss": 2.5, "quant_lam": 0.1, "quant_model.l.0/weight_flips": 0.2, "epoch": 1}]
    rows += [{"step": 1, "eval_loss": 2.0, "eval_runtime": 9.0}]
    file.write_text(json.dumps({"log_history": rows}))
    found = read_history(file)
    assert found.run == {"loss": [(1, 2.5)], "eval_loss": [(1, 2.0)]}
    assert found.quant == {"lam": [(1, 0.1)]}
    assert found.layers == {"weight_flips": {"model.l.0": [(1, 0.2)]}}
    for damaged in ("{", "[]", '{"log_history": [1]}', '{"log_history": 7}'):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"trainer_state\.json: expected a trainer's state"):
            read_history(file)


# Directories


def test_a_directory_that_is_neither_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing: expected a directory, got none of that name"):
        find_sources([tmp_path / "nothing"])
    with pytest.raises(CheckpointError, match=r"expected a training directory .* or an export, got an empty directory"):
        find_sources([tmp_path])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"got notes\.txt\. Name the directory"):
        find_sources([tmp_path])
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")  # a float model
    with pytest.raises(CheckpointError, match="or an export, got model"):
        find_sources([tmp_path])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert not (tmp_path / "r.html").exists()


def logs(directory: Path, text: str = "step,loss\n0,3\n1,2\n") -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.csv").write_text(text)
    return directory


def test_one_run_at_a_time(tmp_path):
    logs(tmp_path / "a" / "lightning_logs" / "version_0")
    assert find_sources([tmp_path / "a"]).logs == tmp_path / "a" / "lightning_logs" / "version_0" / "metrics.csv"
    other = logs(tmp_path / "a" / "lightning_logs" / "version_1")
    with pytest.raises(CheckpointError, match=r"a: expected the logs of one run, got 2: lightning_logs/version_0"):
        find_sources([tmp_path / "a"])
    with pytest.raises(CheckpointError, match=r"report: expected one place with logs, got .* Others to compare"):
        find_sources([other, logs(tmp_path / "b")])


def test_the_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run, out = logs(tmp_path / "run"), tmp_path / "page.html"
    write_page(run, out)
    before = out.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_page(run, out, plots=False)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]
    with pytest.raises(ValueError, match=r"report --out: expected a file, got the directory"):
        write_page(run, tmp_path)


def test_without_matplotlib_the_cure_is_named_and_tables_are_left(tmp_path, monkeypatch):
    run, out = logs(tmp_path / "run"), tmp_path / "page.html"
    real = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"lightning-quant\[report\].*--no-plot"):
        write_page(run, out)
    write_page(run, out, plots=False)
    assert Page(out).count("svg") == 0


# Evaluation


def test_only_figures_that_were_written_down_are_compared(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "eval_results.json").write_text('{"epoch": 1, "eval_loss": 2.5, "eval_runtime": 3}')
    (tmp_path / "b" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "b" / "checkpoint-10").mkdir()
    for number in (9, 10):
        rows = [{"step": 1, "eval_loss": 9.0}, {"step": number, "eval_loss": float(number)}]
        state = tmp_path / "b" / f"checkpoint-{number}" / "trainer_state.json"
        state.write_text(json.dumps({"log_history": rows}))
    results = {"digits": {"float": 0.98, "qat": 0.97}, "seconds": 4.0, "machine": {"cpu": "x", "cores": 2}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = compared([("one", tmp_path / "a"), ("two", tmp_path / "b"), ("all", tmp_path / "results.json")])
    assert found == {"eval_loss": {"one": 2.5, "two": 10.0}, "digits": {"float": 0.98, "qat": 0.97}}
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match=r"--compare .*none: expected evaluation figures .*, got none\. Evaluate"):
        compared([("x", tmp_path / "none")])


def test_runs_to_compare_are_named_or_have_their_directory_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert _named("lr=0.1") == ("lr=0.1", "lr=0.1")
    assert _named("float=lr") == ("float", "lr")
    assert _named("some/run") == ("run", "some/run")


# Names from files


def sensitivity_of(groups: list[tuple[str, ...]]) -> Sensitivity:
    losses = [[0.5, 0.0] for _ in groups]
    table = [[1.0, 2.0] for _ in groups]
    numbers, rest = [4] * len(groups), {"bytes": 0.0, "bops": 0.0}
    return Sensitivity(
        ("w2", EVIL), groups, losses, table, table, None, numbers, [], rest, 0.0, "kl", patterns={}, activations={}
    )


def test_hostile_names_are_text(tmp_path):
    """In logs, in an export and its card, in sensitivity's figures, in results: shown, and nothing more."""
    head = ["step", "loss", f"{EVIL}_loss", "quant/flips", f"quant/{EVIL}", f"quant/{EVIL}/weight_error"]
    quoted = ",".join('"' + name.replace('"', '""') + '"' for name in head)
    run = logs(tmp_path / "run", f"{quoted}\n0,1,1,1,1,0.5\n1,2,2,2,2,0.25\n")
    export = tmp_path / "export"
    export.mkdir()
    save_file({f"{EVIL}.weight": torch.zeros(2, 2)}, export / "model.safetensors")
    (export / "SHA256SUMS").write_text("")
    card = "---\nquantization:\n  method: '<script>'\n  scheme: <b>\n---\n## Loading\n"
    card += f"{EVIL}\n```{EVIL}\n</pre>{EVIL}\n```\n"
    (export / "README.md").write_text(card)
    (tmp_path / "s.json").write_text(json.dumps(sensitivity_of([(EVIL,)]).to_dict()))
    (tmp_path / "r.json").write_text(json.dumps({EVIL: {EVIL: 1.0, "b": 2.0}}))
    out = tmp_path / "page.html"
    found = write_page([run, export], out, compare=[("r", tmp_path / "r.json")], sensitivity=tmp_path / "s.json")
    assert found.sections == ["layers", "sensitivity", "training", "comparison", "loading"]
    page = Page(out)
    page.check()
    shown = clean(EVIL)
    assert page.words.count(shown) >= 10
    assert "\u202e" not in page.source
    assert "\x07" not in page.source
    assert shown in page.rows()
    assert page.count("svg") == 6


def test_text_is_made_harmless():
    assert text("\ud800<") == "\N{REPLACEMENT CHARACTER}&lt;"
    assert text("a\"b'c") == "a&quot;b&#x27;c"


def test_sensitivity_is_read_back_and_other_files_refused(tmp_path):
    found = sensitivity_of([("a", "b"), ("c",)])
    file = tmp_path / "s.json"
    file.write_text(json.dumps(found.to_dict()))
    assert read_sensitivity(file).to_dict() == found.to_dict()
    whole = found.to_dict()
    for wrong in ({**whole, "losses": [[1.0]]}, {**whole, "measure": "x"}, {"a": 1}, [], {**whole, "groups": [[], []]}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="expected figures of lightning-quant sensitivity --json"):
            read_sensitivity(file)
