"""C++ compiled for this processor, once: what it takes to load operators of ours.

Compiling takes some seconds, wants ninja and a C++ compiler, and its result is kept in PyTorch's folder of extensions.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

log = logging.getLogger(__name__)


def load(source: Path, flags: Sequence[str], includes: Sequence[Path] = ()) -> None:
    """Load the operators that a source file registers, compiling it if that was not done before.

    Args:
        source: C++.
        flags: Of the compiler.
        includes: Files of ours that it includes.

    Raises:
        Exception: Whatever a missing or broken compiler raises.
    """
    torch.ops.load_library(_library(source, flags, includes))  # type: ignore[no-untyped-call]


def _library(source: Path, flags: Sequence[str], includes: Sequence[Path]) -> Path:
    """The compiled file; its name tells source, PyTorch and processor, since a cluster's machines share the folder."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    texts = [file.read_text(encoding="utf-8") for file in (source, *includes)]
    made_from = (texts, flags, torch.__version__, sorted(capabilities.items()))
    digest = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    name = f"{source.parent.name}_{source.stem}"
    library = Path(root) / "lightning_quant" / f"{name}_{digest}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    log.info("compiling %s for this processor, once, to %s", source.name, library)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # a killed build leaves no lock behind
        cpp_extension.load(
            name, [str(source)], extra_cflags=list(flags), build_directory=folder, is_python_module=False
        )
        (Path(folder) / f"{name}.so").replace(library)  # the file that is loaded already, under another name
    return library
