"""Draw the README's plots: every method's Q and F, one method's in full, and the curves of schedules.

python examples/plots.py --out examples/plots
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_quant.plots import draw, draw_all, draw_schedules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw("pege", out / "pege.png")
    draw_all(out / "methods.png")
    draw_schedules(out / "schedules.png")


if __name__ == "__main__":
    main()
