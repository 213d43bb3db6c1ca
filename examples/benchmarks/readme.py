"""Fill the README's tables of figures from the committed results.

``python examples/benchmarks/readme.py`` rewrites README.md; with ``--check`` the exit status is 1 if it would change.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
sys.path.insert(0, str(HERE.parent))

import architectures  # noqa: E402
import distill  # noqa: E402
import export_7b  # noqa: E402
import formats  # noqa: E402
import logging_cost  # noqa: E402
import overhead  # noqa: E402
import overhead_scaling  # noqa: E402
import ptq  # noqa: E402
import ptq_1b  # noqa: E402
import qlora_memory  # noqa: E402
import roofline_check  # noqa: E402
import runtime  # noqa: E402
from demo import table as demo_table  # noqa: E402
from ladder import tables  # noqa: E402

from lightning_quant import ESTIMATORS, catalog  # noqa: E402
from lightning_quant.transforms.setup import KINDS, OWN  # noqa: E402


def results(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def demo_section() -> str:
    data = results("demo")
    digits = "\n".join(f"| {name} | {value:.4f} |" for name, value in data["digits_accuracy"].items())
    return (
        f"{demo_table(data['validation_loss'])}\n\nThe CNN on scikit-learn's digits, accuracy on 397 held-out images "
        f"(`rounded` is the fine-tuned float model, calibrated):\n\n| | accuracy |\n|---|---|\n{digits}\n\n"
        f"{data['seconds']:.0f} s in all on {data['machine']['processor']}, {data['machine']['cores']} cores."
    )


def methods_section() -> str:
    lines = [
        "| method | what | paper | bits | learned | kept in training | bytes per weight | file | test |",
        "|---" * 9 + "|",
    ]
    for row in catalog.methods():
        kind = ESTIMATORS[row.name]
        links = [f"[{n}](https://arxiv.org/abs/{n})" for n in kind.about.link.split(", ") if n]
        paper = ", ".join([kind.about.paper, *links])
        file = kind.__module__.replace(".", "/") + ".py"
        where = f"[{Path(file).name}]({file}) | [oracle](tests/oracle/{row.name}.py)"
        what = row.what.rstrip(".")
        cells = f"{paper} | {row.bits} | {row.learned} | {row.state} | {row.memory:.3g}"
        lines.append(f"| `{row.name}` | {what} | {cells} | {where} |")
    for title, parts in catalog.parts().items():
        if title != "curves of schedules":
            lines += ["", f"| {title[:-1]} | what |", "|---|---|"]
            lines += [f"| `{name}` | {line.rstrip('.').replace('|', chr(92) + '|')} |" for name, line in parts.items()]
    return "\n".join(lines).replace("``", "`")


def setup_section() -> str:
    lines = ["| step | what | options | paper | file |", "|---" * 5 + "|"]
    for name, step in (pair for _, known in KINDS for pair in known.items()):
        text = inspect.getdoc(step) or ""
        options = [f"{p.name}={p.default!r}" for p in inspect.signature(step).parameters.values() if p.name not in OWN]
        links = re.findall(r"arXiv:(\d{4}\.\d{5})", text + (inspect.getdoc(sys.modules[step.__module__]) or ""))
        link = "".join(f"[{n}](https://arxiv.org/abs/{n})" for n in links[:1])
        file = step.__module__.replace(".", "/") + ".py"
        what = text.splitlines()[0].rstrip(".").removesuffix(", in place").replace("|", "\\|").replace("``", "`")
        given = ", ".join(f"`{option}`" for option in options)
        lines.append(f"| `{name}` | {what} | {given} | {link} | [{Path(file).name}]({file}) |")
    return "\n".join(lines)


def scaling_section() -> str:
    file = overhead_scaling.RESULTS
    return overhead_scaling.table(results(file.stem)) if file.exists() else overhead.NOTHING


SECTIONS = {
    "setup": setup_section,
    "methods": methods_section,
    "architectures": lambda: architectures.table(results("architectures")),
    "formats": lambda: formats.table(results("formats")),
    "overhead": lambda: overhead.table(results("overhead")),
    "overhead_share": lambda: overhead.share_table(results("overhead")),
    "overhead_ablation": lambda: overhead.ablation_table(results("overhead")),
    "overhead_scaling": scaling_section,
    "logging": lambda: logging_cost.table(results("logging")),
    "distill": lambda: distill.table(results("distill")),
    "export": lambda: export_7b.table(results("export")),
    "ptq": lambda: ptq.table(results("ptq")),
    "ptq_1b": lambda: ptq_1b.table(results("ptq_1b")),
    "qlora": lambda: qlora_memory.table(results("qlora")),
    "roofline": lambda: roofline_check.table(results("roofline")),
    "runtime": lambda: runtime.table(results("runtime")),
    "accuracy": lambda: tables.table(results("accuracy")),
    "demo": demo_section,
}


def filled(text: str) -> str:
    """The README with every generated section made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, s=make: f"{m[1]}{s()}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md: expected one section {name}, got {count}. Restore its markers.")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        raise SystemExit(int(new != old))
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
