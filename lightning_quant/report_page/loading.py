"""How an export is loaded: what its own card says, and what else reads it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from lightning_quant.export.card import CARD_FILE
from lightning_quant.export.formats import FORMATS
from lightning_quant.report_page.html import block, paragraph, text

PLAIN = {
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("EXPORT/model.onnx")',
    "folded": "from safetensors.torch import load_file\n\n"
    'model.load_state_dict(load_file("EXPORT/model.safetensors"))  # the float model of your own code',
}
OURS = 'from lightning_quant import runtime\n\nmodel = runtime.load("EXPORT")  # on low-bit kernels of the processor'


def format_name(export: Path) -> str:
    """Name of an export's format."""
    return next(name for name, format in FORMATS.items() if format.holds(export))


def card_facts(export: Path) -> dict[str, str]:
    """What an export's card says of its quantization: ``method``, ``scheme``; empty where it has no card."""
    match = re.match(r"---\n(.*?)\n---\n", _card(export), re.DOTALL)
    try:
        found = yaml.safe_load(match[1])["quantization"] if match else {}
        return {str(k): str(v) for k, v in found.items()}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):  # somebody else's README
        return {}


def card_section(export: Path, title: str) -> str:
    """The text under a heading of an export's card; empty without one."""
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", _card(export), re.DOTALL | re.MULTILINE)
    return match[1].strip() if match else ""


def loading_html(export: Path) -> str:
    """How to load an export in each runtime that reads it."""
    name = format_name(export)
    found = _html(card_section(export, "Loading"))
    if not found and name in PLAIN:
        found = block(PLAIN[name])
    if name == "compressed-tensors":
        found += paragraph("With this package, on CPUs:") + block(OURS)
    return paragraph(f"<code>EXPORT</code> is the directory <code>{text(export)}</code>.") + found if found else ""


def _card(export: Path) -> str:
    file = export / CARD_FILE
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _html(markdown: str) -> str:
    """Paragraphs and fenced code, which is all that a card's text is made of."""
    parts = []
    for i, part in enumerate(re.split(r"^```.*\n?", markdown, flags=re.MULTILINE)):
        if part.strip():
            lines = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", text(part.strip()))
            parts.append(block(part) if i % 2 else paragraph(lines))
    return "".join(parts)
