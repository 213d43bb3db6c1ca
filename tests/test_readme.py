"""The README's tables are those of the code and of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lightning_quant import ESTIMATORS, OBSERVERS
from lightning_quant.codebooks import CODEBOOKS
from lightning_quant.ranges import RANGES
from lightning_quant.scales import SCALE_FORMATS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(first_column: str) -> dict[str, list[str]]:
    """Cells by the name in the first column of the table with that heading."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [c.strip() for c in line.strip("|").split("|")]
        found[cells[0].strip("`")] = cells
    return found


def test_every_method_has_its_row_with_paper_file_and_oracle():
    found = rows("method")
    assert list(found) == list(ESTIMATORS)
    for name, kind in ESTIMATORS.items():
        cells = found[name]
        assert re.search(r"\d{4}", cells[2]), name
        assert re.search(r"\]\((.*?)\)", cells[7])[1] == kind.__module__.replace(".", "/") + ".py"
        assert re.search(r"\]\((.*?)\)", cells[8])[1] == f"tests/oracle/{name}.py"


def test_every_part_has_its_row():
    for title, table in (("observer", OBSERVERS), ("range", RANGES), ("scale format", SCALE_FORMATS)):
        assert list(rows(title)) == list(table)
    assert list(rows("grid")) == ["int", "midrise", *CODEBOOKS]


def test_links_point_at_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_figures_are_generated_from_the_committed_results():
    script = ROOT / "examples" / "benchmarks" / "readme.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
