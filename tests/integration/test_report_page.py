"""The report of real runs: Lightning and Hugging Face with their own logs, their exports, and a real browser."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_integration import QuantArguments
from lightning_quant import QuantCallback, QuantConfig, attach
from lightning_quant.checkpoint import load_training_checkpoint
from lightning_quant.cli import main
from lightning_quant.export import export
from lightning_quant.export.streamed import open_training_directory
from lightning_quant.report_page.history import read_history
from lightning_quant.report_page.layers import measure_model
from lightning_quant.report_page.write import PageReport, write_page
from tests.integration.modules import QUIET, Cnn, images, trainer
from tests.integration.report_browser import check, chromium, faults
from tests.integration.test_trainer import dataset, make
from tests.integration.tiny import causal_lm, token_rows
from tests.report_pages import Page

pytestmark = QUIET
LAYER = "model.layers.1.mlp.down_proj"
ALL = ["layers", "weights", "sensitivity", "training", "comparison", "loading"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A float run's evaluation, a quantized run with its log, its export inside of it, sensitivity's figures."""
    root = tmp_path_factory.mktemp("report")
    settings = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    quant = QuantArguments(quant="pege", quant_scheme="w3a16-g32", quant_log_layers=1)
    runner = make(root, quant, eval_dataset=dataset(8, seed=3), **settings)
    runner.train()
    runner.save_model()
    runner.save_state()
    runner.export(root / "run" / "int3")
    (root / "float").mkdir()
    (root / "float" / "eval_results.json").write_text('{"eval_loss": 4.25, "epoch": 1.0}')
    rows = torch.tensor([r["input_ids"] for r in token_rows(4)])
    save_file({"input_ids": rows, "labels": rows.clone()}, root / "rows.safetensors")
    words = ["--data", str(root / "rows.safetensors"), "--schemes", "w2a16-g32,w4a16-g32"]
    assert main(["sensitivity", str(root / "run"), *words, "--json", str(root / "run" / "sensitivity.json")]) == 0
    return root


@pytest.fixture(scope="module")
def written(root) -> PageReport:
    return write_page(root / "run", root / "page.html", compare=[("float", root / "float")], logits=True)


def test_the_page_has_every_part_and_loads_nothing(root, written):
    page = Page(written.path)
    page.check()
    assert written.sections == page.sections == ALL
    assert page.count("figure") == page.count("svg") == 7
    assert page.words.count(f"The layer that hurts most: {written.worst}.") == 1
    assert "verify: what is stored is what was trainedequal" in page.words
    assert "max|d logits| = 0.0" in page.words
    assert "w3 group32 learned" in page.words
    assert 'LlamaForCausalLM.from_pretrained("EXPORT")' in page.words
    assert 'runtime.load("EXPORT")' in page.words
    scores = page.rows(2)
    history = json.loads((root / "run" / "trainer_state.json").read_text())["log_history"]
    last = [row["eval_loss"] for row in history if "eval_loss" in row][-1]
    assert scores == {"float": {"eval_loss": "4.25"}, "run": {"eval_loss": f"{last:.5g}"}}


def test_figures_are_those_of_the_files(root, written):
    """Of one layer, from the float weights, the scales and what transformers makes of the export."""
    weights = load_file(root / "run" / "model.safetensors")
    state = load_file(root / "run" / "quant_state.safetensors")
    stored = load_file(root / "run" / "int3" / "model.safetensors")
    reader = AutoModelForCausalLM.from_pretrained(root / "run" / "int3")
    shipped = reader.get_submodule(LAYER).weight.detach().double()
    weight = weights[f"{LAYER}.weight"].double()
    error = float((weight - shipped).square().sum() / weight.square().sum())
    scale = state[f"{LAYER}.weight_quant.scale"].double().reshape(64, 4, 1)
    places = weight.reshape(64, 4, 32) / scale
    clip = float(((places > 3.5) | (places < -4.5)).double().mean())
    codes = (shipped.reshape(64, 4, 32) / scale).round()
    size = sum(t.numel() * t.element_size() for name, t in stored.items() if name.startswith(f"{LAYER}."))
    row = Page(written.path).rows()[LAYER]
    heads = {name.strip(): value for name, value in row.items()}
    assert float(heads["error %"]) == pytest.approx(100 * math.sqrt(error), rel=5e-3)
    assert float(heads["SNR dB"]) == pytest.approx(-10 * math.log10(error), abs=0.05)
    assert float(heads["clipped %"]) == pytest.approx(100 * clip, rel=5e-3)
    assert float(heads["codes used %"]) == 100 * len(codes.unique()) / 8
    assert heads["bytes"] == f"{size:,}"
    assert heads["float bytes"] == f"{weight.numel() * 4:,}"
    (found,) = (f for f in written.layers if f.name == LAYER)
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.histogram.after == pytest.approx([float((codes == c).double().mean()) for c in range(-4, 4)])
    errors = [f.error for f in written.layers]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 14
    logged = read_history(root / "run" / "trainer_state.json").last("weight_error")
    assert found.error == pytest.approx(logged[LAYER], rel=0.05)  # of the last forward, one update earlier


def test_weights_stay_on_disk(root):
    model = open_training_directory(root / "run")
    streamed = measure_model(model, root / "run" / "int3")
    assert all(p.is_meta for n, p in model.named_parameters() if n.endswith("proj.weight"))
    held = measure_model(load_training_checkpoint(root / "run"), root / "run" / "int3")
    assert streamed == held
    assert streamed.before == sum(
        t.numel() * t.element_size() for t in load_file(root / "run/model.safetensors").values()
    )


def test_an_export_alone(root, tmp_path):
    found = write_page(root / "run" / "int3", tmp_path / "page.html")
    assert found.sections == ["layers", "loading"]
    assert found.worst is None
    page = Page(found.path)
    page.check()
    rows = page.rows()
    assert rows[LAYER]["codes used %"] == "100"
    assert rows[LAYER]["error %"] == ""
    assert rows["lm_head"]["bytes"] == "24,576"
    assert "Name the training directory as well" in page.words


def test_a_damaged_export_is_a_verdict(root, tmp_path):
    shutil.copytree(root / "run" / "int3", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights[f"{LAYER}.weight_packed"][0, 0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    found = write_page([root / "run", tmp_path / "out"], tmp_path / "page.html", plots=False)
    assert not found.verdict.ok
    words = Page(found.path).words
    assert "the export differs from what was trainedDIFFERENT" in words
    assert f"first difference: {LAYER}" in words
    del weights[f"{LAYER}.weight_packed"]
    save_file(weights, file, metadata={"format": "pt"})
    found = write_page([root / "run", tmp_path / "out"], tmp_path / "page.html", plots=False)
    assert isinstance(found.verdict, ValueError)
    assert "DAMAGED" in Page(found.path).words


@pytest.mark.parametrize("format", ["gguf", "folded"])
def test_other_formats(format, tmp_path):
    model, config = causal_lm(), QuantConfig.parse("ste", "w4a16-g32", target="llama.cpp")
    attach(model, config)
    export(model, tmp_path / "out", format=format, config=config)
    found = write_page(tmp_path / "out", tmp_path / "page.html", model=model)
    assert found.verdict.ok
    page = Page(found.path)
    page.check()
    assert found.sections == ["layers", "weights", "loading"]
    assert {f.name for f in found.layers} >= {LAYER}
    assert ("llama-cli" in page.words) == (format == "gguf")
    assert ("those of the export's tensors" in page.words) == (format == "folded")  # GGUF has names of its own


@pytest.fixture(scope="module")
def lightning_run(tmp_path_factory) -> tuple[Path, Cnn]:
    root = tmp_path_factory.mktemp("lightning")
    quant, module = QuantCallback("lsq", "w4a4", log_layers_every_n_steps=4), Cnn(lr=0.01)
    loggers = [CSVLogger(root / "csv"), TensorBoardLogger(root / "board")]
    trainer(root, quant, logger=loggers, log_every_n_steps=2, enable_checkpointing=True).fit(
        module, images(), images(seed=1)
    )
    quant.export(module, root / "out")
    return root, module


def test_lightning_from_its_logs_alone(lightning_run, tmp_path):
    root, _ = lightning_run
    pages = {}
    for name in ("csv", "board"):
        pages[name] = write_page([root / name, root / "out"], tmp_path / f"{name}.html")
        Page(pages[name].path).check()
        assert pages[name].sections == ["layers", "training", "comparison", "loading"]
        assert {f.name for f in pages[name].layers} == {"body.0", "body.3", "head"}
        assert all(f.logged for f in pages[name].layers)
    for mine, theirs in zip(pages["csv"].layers, pages["board"].layers, strict=True):
        assert (mine.name, mine.stored) == (theirs.name, theirs.stored)
        assert mine.error == pytest.approx(theirs.error, rel=1e-6)


def test_lightning_with_its_module_is_measured(lightning_run, tmp_path, monkeypatch, capsys):
    root, module = lightning_run
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    words = ["report", str(root / "csv"), str(root / "out"), "--out", str(tmp_path / "page.html")]
    assert main([*words, "--module", "tests.integration.modules:Cnn"]) == 0
    assert "layers, weights, training, comparison, loading; 3 layers" in capsys.readouterr().out
    page = Page(tmp_path / "page.html")
    assert "logits were not compared" in page.words
    assert "what was trainedequal" in page.words
    layer = module.body[3]
    weight, rounded = layer.weight.detach().double(), layer.on_grid().double()
    error = float((weight - rounded).square().sum() / weight.square().sum())
    assert float(page.rows()["body.3"]["error %"]) == pytest.approx(100 * math.sqrt(error), rel=5e-3)
    found = write_page([root / "csv", root / "out"], tmp_path / "same.html", model=module)
    assert Page(found.path).tables == page.tables
    assert main([*words, "--module", "tests.integration.modules:None_such"]) == 2
    assert "report --module tests.integration.modules:None_such: expected a class" in capsys.readouterr().err


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_a_browser_shows_every_plot_and_complains_of_nothing(written, tmp_path):
    found = check(written.path, chromium(), tmp_path)
    assert faults(written.path, found) == []
    assert [name for name, _ in found["sections"]] == ALL
    assert len(found["plots"]) == 7
    assert len(set(found["sorted"][0])) > 1
    light, dark = ((tmp_path / f"page-{name}.png").read_bytes() for name in ("light", "dark"))
    assert min(len(light), len(dark)) > 10_000
    assert light != dark


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_the_browser_would_see_what_is_wrong(written, tmp_path):
    """A script that was put into a page does not run, and is reported with everything it wanted to load."""
    page = tmp_path / "page.html"
    source = written.path.read_text(encoding="utf-8")
    bad = '<img src="https://example.org/x.png"><script>document.title = "taken over"</script></body>'
    page.write_text(source.replace("</body>", bad), encoding="utf-8")
    wrong = faults(page, check(page, chromium()))
    assert len([line for line in wrong if "Content Security Policy" in line]) >= 2
