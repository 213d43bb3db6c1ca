"""The shape of the house: imports flow one way, front ends stay at the edge, nothing names a machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lightning_quant", "hf_integration")

# Lower layers first; a module may import its own layer and the ones before it.  What is not listed is at the edge:
# it may import everything here, and nothing here may import it.
LAYERS = (
    ("errors", "version", "schedule", "distributed", "noise", "progress", "reuse", "scratch", "native", "report"),
    ("graph", "adapters", "targets", "zero", "presets"),
    ("scheme", "spec"),
    ("granularity", "codebooks", "scales", "integer"),
    ("grid",),
    ("estimators", "observers", "ranges", "triton_kernels"),
    ("resolve", "settings", "metrics", "encoding", "quantizer"),
    ("norms", "operators", "packed", "rounded_product", "bypass", "kv_cache"),
    ("layers", "transformers_layers", "experts", "lora", "bnb"),
    ("bn_ranges", "plan", "fast_path"),
    ("attach",),
    ("calibration", "curvature", "fused", "optim", "parts", "outputs", "soft_targets", "distill"),
    ("transforms", "rounding"),
    ("controller",),
)
EDGE = len(LAYERS)
RANK = {f"lightning_quant.{name}": rank for rank, layer in enumerate(LAYERS) for name in layer}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources()}


def rank(module: str) -> int:
    """Layer of a module; packages inside the core count as one module."""
    return RANK.get(".".join(module.split(".")[:2]), EDGE)


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path) -> Iterator[str]:
    """Modules that the file imports anywhere, except for type checkers."""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if is_typing_block(child):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield whole if whole in MODULES else str(child.module)
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def test_every_module_of_the_map_exists():
    missing = [name for name in RANK if name not in MODULES]
    assert not missing


def test_no_arrow_points_back():
    wrong = []
    for module, path in MODULES.items():
        if module == "lightning_quant":  # the facade: names from everywhere, for users only
            continue
        for target in imports(path):
            if target.split(".")[0] in PACKAGES and rank(target) > rank(module):
                wrong.append(f"{module} imports {target}")
    assert not wrong, wrong


def test_arrows_back_would_be_seen(tmp_path):
    """The reader below the test above sees imports in functions, from packages, and skips typing blocks."""
    text = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lightning_quant.controller import QuantController\n"
        "from lightning_quant import grid\n"
        "def f():\n    from lightning_quant.attach import attach\n    import lightning_quant\n"
    )
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    assert list(imports(tmp_path / "a.py")) == [
        "typing",
        "lightning_quant.grid",
        "lightning_quant.attach",
        "lightning_quant",
    ]
    assert rank("lightning_quant") == rank("lightning_quant.callback") == rank("hf_integration.trainer") == EDGE
    assert (
        rank("lightning_quant.estimators.pege")
        == rank("lightning_quant.observers.ema")
        < rank("lightning_quant.attach")
    )


def test_no_import_cycles():
    """Among modules loaded at import time; imports inside functions may close a circle."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        top = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in top for alias in node.names}
        targets = {name if name in MODULES else name.rpartition(".")[0] for name in names}
        graph[module] = (targets & MODULES.keys()) - {module, "lightning_quant"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_only_the_callback_imports_lightning():
    """The callback, and the file that holds what it knows of Lightning's checkpoints and other callbacks."""
    files = {"lightning_quant.callback", "lightning_quant.lightning_support"}
    for module, path in MODULES.items():
        roots = {target.split(".")[0] for target in imports(path)}
        assert module in files or not roots & {"lightning", "pytorch_lightning"}, module


def test_the_core_knows_no_framework():
    """One file each holds what only transformers, PEFT, bitsandbytes and scipy have; it is imported when needed."""
    frameworks = {"lightning", "pytorch_lightning", "transformers", "accelerate", "peft", "datasets"}
    frameworks |= {"numpy", "scipy", "matplotlib", "bitsandbytes"}
    own = ("lightning_quant.transformers_layers", "lightning_quant.lora", "lightning_quant.bnb")
    own += ("lightning_quant.rounding.lapq",)
    for module, path in MODULES.items():
        if rank(module) < EDGE and module not in own:
            roots = {target.split(".")[0] for target in imports(path)}
            assert not roots & frameworks, module


BLOCKED = ("lightning", "pytorch_lightning", "transformers", "accelerate", "datasets", "peft", "compressed_tensors")
BLOCKED += ("onnx", "onnxscript", "onnxruntime", "bitsandbytes", "gguf")
PROGRAM = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import lightning_quant, hf_integration
assert not set({BLOCKED!r}) & {{m.split(".")[0] for m in sys.modules}}
import torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
lightning_quant.attach(model, lightning_quant.QuantConfig.parse("pege", "w8a8"))
model(torch.randn(2, 8)).sum().backward()
lightning_quant.detach(model)
"""


def test_core_works_without_any_framework_installed():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_public_names_resolve():
    import lightning_quant

    for name in lightning_quant.__all__:
        assert getattr(lightning_quant, name) is not None
    with pytest.raises(AttributeError, match="module 'lightning_quant' has no attribute 'quantise'"):
        _ = lightning_quant.quantise


TEXT = {".py", ".toml", ".md", ".yaml", ".yml", ".json", ".txt", ".cfg", ".sh", ".html"}
SKIPPED = {".git", ".venv", "build", "dist", "demo", "lightning_logs", "checkpoints", "__pycache__"}


def repository_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.suffix in TEXT and not any(p in SKIPPED or p.startswith(".venv") for p in parts):
            yield path


def test_no_file_names_a_path_of_a_machine():
    places = "|".join(("home", "Users", "root", "work", "mnt", "tmp", "scratch", "workspace", "content", "kaggle"))
    absolute = re.compile(rf"(?<![\w.:/~*-])/(?:{places})/[\w.]")
    assert absolute.search(f"open('/{'home'}/someone/data')")
    assert not absolute.search("https://host/work/page, ./tmp/x, out/work/x")
    found = []
    for path in repository_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if absolute.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, found
