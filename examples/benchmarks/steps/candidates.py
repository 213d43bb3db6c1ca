"""What ``overhead.py`` measures: plain training, this package's methods, other libraries, LoRA and checkpointing.

A candidate is a mapping that ``steps.worker`` builds a training step from.  Each is compared with the candidate
in ``BASELINES`` that trains the same parameters in the same way without quantization.
"""

from __future__ import annotations

import re
from typing import Any

from steps.models import FAMILIES

METHODS = {
    "w4a16": ("ste", "lsq", "ewgs", "pege", "pege element"),
    "w8a8": ("ste", "pege"),
    "w8a8-static": ("ste", "lsq", "pege"),
}
FEWER = {"w4a16": ("ste", "lsq", "pege"), "w8a8": ("ste",), "w8a8-static": ("ste", "lsq")}
AROUND = {"LoRA": {"lora": True}, "checkpointed": {"checkpointing": True}}
BASELINES: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    "plain LoRA": {"kind": "plain", "lora": True},
    "plain checkpointed": {"kind": "plain", "checkpointing": True},
}
Candidates = dict[str, dict[str, Any]]


def candidates(family: str, compile_model: bool = False) -> Candidates:
    """All of a family, in the order of the table.

    Args:
        family: A name of ``FAMILIES``.
        compile_model: The models are compiled as wholes, so that kernels of the quantizers' own have no use.
    """
    schemes = FAMILIES[family].schemes
    methods = METHODS if family == "llama" else FEWER
    own = ("",) if compile_model else ("", " compiled") if family == "llama" else (" compiled",)
    found: Candidates = {"plain": BASELINES["plain"]}
    found["plain, again"] = {**BASELINES["plain"], "baseline": "plain"}
    for scheme in schemes:
        for method in methods[re.sub(r"-(g\d+|channel)$", "", scheme)]:
            for way in own:
                found[f"ours {method}{way} {scheme}"] = ours(method, scheme, bool(way))
    for library in ("torchao", "modelopt"):
        for scheme in filter(lambda scheme: _serves(library, scheme), schemes):
            found[f"{library} {scheme}"] = {"kind": library, "scheme": scheme, "baseline": "plain"}
    if "vocab" not in FAMILIES[family].sizes:
        return found
    for word, around in AROUND.items():
        baseline, way = f"plain {word}", own[-1]
        found[baseline] = BASELINES[baseline]
        if word == "LoRA":
            found[f"PEFT's two paths {word}"] = {"kind": "plain", **around, "two_paths": True, "baseline": baseline}
        for scheme in schemes[:2]:
            for method in FEWER[re.sub(r"-g\d+$", "", scheme)]:
                found[f"ours {word} {method}{way} {scheme}"] = {**ours(method, scheme, bool(way), baseline), **around}
    return found


def ours(method: str, scheme: str, compiled: bool, baseline: str = "plain", **more: Any) -> dict[str, Any]:
    """A candidate of this package.

    Args:
        method: Its name; ``pege element``: with one Theta per element.
        scheme: The scheme.
        compiled: Whether the quantizers run kernels of their own.
        baseline: What it is compared with.
        more: Further entries.
    """
    name, *element = method.split()
    options = ({"theta": "element"} if element else {}) | {"compile": compiled}
    return {"kind": "ours", "method": name, "scheme": scheme, "options": options, "baseline": baseline, **more}


def _serves(library: str, scheme: str) -> bool:
    """Torchao's training quantizes Linear layers and has no static ranges; ModelOpt's has no dynamic ones."""
    return bool(re.match(r"w4a16-g\d+$", scheme)) or scheme == {"torchao": "w8a8", "modelopt": "w8a8-static"}[library]


def chosen(all_of_them: Candidates, only: list[str] | None, peers: bool) -> Candidates:
    """Those whose name holds one of some words, with their baselines; without peers where none are installed."""
    kept = {
        name: c
        for name, c in all_of_them.items()
        if "baseline" in c and (peers or c["kind"] in ("plain", "ours")) and (not only or any(o in name for o in only))
    }
    needed = {c["baseline"] for c in kept.values()} | {"plain"}
    return {name: c for name, c in all_of_them.items() if name in kept or name in needed}
