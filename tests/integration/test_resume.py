"""kill -9 in mid-schedule, resume, and end with the same bits as the run that was never interrupted."""

from __future__ import annotations

import signal

import pytest

from tests.integration.processes import differing, result, run

RUNS = [("pege", "w4a16-g32"), ("pege", "w8a8-static"), ("pege_replace", "w2a16-g32"), ("dsq", "w4a16-g32")]


@pytest.mark.parametrize(("method", "scheme"), RUNS)
def test_lightning_resume_is_bit_exact(tmp_path, method, scheme):
    args = ("--method", method, "--scheme", scheme)
    run("lightning_run.py", "--out", tmp_path / "whole", *args)
    run("lightning_run.py", "--out", tmp_path / "cut", "--die-at", 19, *args, expect=-signal.SIGKILL)
    assert not (tmp_path / "cut" / "rank0.pt").exists()
    run("lightning_run.py", "--out", tmp_path / "cut", "--resume", *args)
    whole, cut = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert len(cut["losses"]) == 32 - 16
    assert cut["losses"] == whole["losses"][16:]
    assert differing(whole["state"], cut["state"]) == []


@pytest.mark.parametrize(
    ("method", "scheme", "theta"), [(*r, "group") for r in RUNS] + [("pege", "w2a16-g32", "element")]
)
def test_trainer_resume_is_bit_exact(tmp_path, method, scheme, theta):
    args = ("--method", method, "--scheme", scheme, "--theta", theta)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    run("hf_run.py", "--out", tmp_path / "whole", *args)
    run("hf_run.py", "--out", tmp_path / "cut", "--die-at", 6, *args, expect=-signal.SIGKILL)
    assert not (tmp_path / "cut" / "rank0.pt").exists()
    run("hf_run.py", "--out", tmp_path / "cut", "--resume", *args)
    whole, cut = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert cut["losses"] == whole["losses"]
    assert differing(whole["state"], cut["state"]) == []
