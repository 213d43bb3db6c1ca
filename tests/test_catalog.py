"""The table of methods, their descriptions, and the plots of methods and schedules."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lightning_quant import ESTIMATORS, catalog, cli, plots
from lightning_quant.estimators.dsq import Dsq
from lightning_quant.estimators.pege import Pege
from lightning_quant.estimators.ste import Ste

ROOT = Path(__file__).resolve().parents[1]


def is_drawn(path: Path, colours: int) -> bool:
    """A PNG with at least this many colours in it."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = (imread(path)[..., :3].reshape(-1, 3) * 255).astype(int)
    return len(np.unique(pixels, axis=0)) >= colours


def test_every_method_says_what_it_is():
    for row in catalog.methods():
        assert row.what
        assert row.bits
        assert row.learned
        assert any(c.isdigit() for c in row.paper), row
        assert row.memory >= 0
    assert [r.name for r in catalog.methods()] == list(ESTIMATORS)


@pytest.mark.parametrize(
    ("name", "memory", "state"),
    [
        ("ste", 4 / 128, "w: scale"),  # one float32 per group of 128
        ("lsq", 16 / 128, "w: scale"),  # with its gradient and two moments
        ("pege", 32 / 128, "w: scale, theta"),
        ("dorefa", 0.0, "a: scale, zero, running"),  # the weights' grid is fixed
    ],
)
def test_memory_and_state_by_hand(name, memory, state):
    (row,) = (r for r in catalog.methods() if r.name == name)
    assert row.memory == pytest.approx(memory, abs=1e-3)
    assert row.state == state


@pytest.mark.parametrize("name", ESTIMATORS)
def test_description_holds_formula_defaults_and_source(name):
    text = catalog.describe(name)
    assert text.startswith(f"{name}: ")
    assert "``" in text
    assert "Source:" in text
    for f in fields(ESTIMATORS[name]):
        if f.init:
            assert f"  {f.name} = " in text


def test_unknown_method():
    with pytest.raises(ValueError, match=r"lightning-quant methods: .*Did you mean method 'pege'"):
        catalog.describe("pegge")


# --- curves ---------------------------------------------------------------------------------------------------------


def test_straight_through_curves():
    (curve,) = plots.curves(Ste(), True)
    step = curve.hard.unique().diff()[0]
    torch.testing.assert_close(curve.slope, torch.ones_like(curve.x))
    torch.testing.assert_close(curve.soft, curve.x, rtol=0, atol=1e-5)
    torch.testing.assert_close(curve.hard, (curve.x / step).round() * step, rtol=0, atol=1e-5)
    assert curve.x[-1].item() == pytest.approx(plots.BINS * step.item(), rel=1e-4)


@pytest.mark.parametrize("rule", [Dsq(), Pege()])
def test_surrogates_meet_the_levels_and_the_middles(rule):
    for curve in plots.curves(rule, True):
        step = curve.hard.unique().diff()[0]
        at = [int((curve.x - k * step / 2).abs().argmin()) for k in (-2, -1, 0, 1, 2)]
        want = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]) * step / 2
        torch.testing.assert_close(curve.soft[at], want, rtol=0, atol=0.01 * float(step))
        assert curve.slope[at[1]] >= curve.slope[at[2]] - 1e-3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_method_is_drawn(name, tmp_path):
    path = plots.draw(name, tmp_path / f"{name}.png")
    assert is_drawn(path, 20)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_examples_draw_the_plots_of_the_readme(tmp_path):
    subprocess.run([sys.executable, ROOT / "examples" / "plots.py", "--out", tmp_path], check=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("methods", "pege", "schedules"):
        assert is_drawn(tmp_path / f"{name}.png", 20)
        assert (ROOT / "examples" / "plots" / f"{name}.png").is_file()
        assert f"(examples/plots/{name}.png)" in readme


# --- the command ----------------------------------------------------------------------------------------------------


def test_command_lists(capsys):
    assert cli.main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in ESTIMATORS)
    assert "\nranges\n" in out
    assert "sigmoid" in out


def test_command_explains_and_plots(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["methods", "pege"]) == 0
    out = capsys.readouterr().out
    assert "dF/du" in out
    assert "sharpness = 4.0" in out
    assert is_drawn(tmp_path / "pege.png", 20)
    assert cli.main(["methods", "dsq", "--plot", "somewhere.png"]) == 0
    assert is_drawn(tmp_path / "somewhere.png", 20)
    assert cli.main(["methods", "lsq", "--no-plot"]) == 0
    assert not (tmp_path / "lsq.png").exists()


def test_command_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["methods", "pegge"]) == 2
    assert "Did you mean method 'pege'" in capsys.readouterr().err
    assert cli.main(["methods", "--plot", "x.png"]) == 2
    assert "expected a method's name" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["methods", "pege"]) == 2
    captured = capsys.readouterr()
    assert "pip install 'lightning-quant[report]'" in captured.err
    assert "sharpness = 4.0" in captured.out
