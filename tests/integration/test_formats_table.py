"""The README's table of formats is what the readers make of the exports today."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from formats import MODELS, ROWS, cell, reason, trained  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _forget_models():
    yield
    trained.cache_clear()


@pytest.mark.filterwarnings("ignore")  # of exporters, which other tests hold to silence
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_a_cell_says_what_happens(name, row):
    committed = json.loads((BENCHMARKS / "results" / "formats.json").read_text(encoding="utf-8"))["cells"][row][name]
    found = cell(name, row)
    assert found["verdict"] in ("exact", "bound", "refused")
    if found["verdict"] == "refused" or committed["verdict"] == "refused":
        assert reason(found["why"]) == reason(committed["why"])
    elif row.startswith("onnx"):  # the order of a float sum differs from machine to machine
        assert found["max_abs_diff"] <= found["tolerance"]
    else:
        assert found["verdict"] == committed["verdict"] == "exact"
