"""Figures of matplotlib as SVG inside a page: its text in the page's font and color, nothing loaded from elsewhere."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_quant.plots import figure_of, save
from lightning_quant.report_page.html import clean, text

BLACK = "#000000"  # matplotlib's color of axes and text, which becomes the page's
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "page",
    "text.parse_math": False,  # a layer's name may hold a dollar sign
    "savefig.transparent": True,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 8,
}


def picture(name: str, caption: str, draw: Callable[[Path], object]) -> str:
    """A figure of HTML.

    Args:
        name: Goes before the ids in it, so that those of several figures differ; letters and digits.
        caption: Text.
        draw: Writes the SVG file it is told, by ``plots.save`` of a figure from ``plots.figure_of``.
    """
    with tempfile.TemporaryDirectory() as place, _settings():
        file = Path(place) / "figure.svg"
        draw(file)
        source = file.read_text(encoding="utf-8")
    source = re.sub(r"<metadata>.*?</metadata>", "", source[source.index("<svg") :], count=1, flags=re.DOTALL)
    source = re.sub(r"<[^>]*>", lambda tag: _own(tag[0], name), source)
    source = source.replace("<svg", f'<svg role="img" aria-label="{text(caption)}"', 1)
    return f'<figure>{source}<figcaption class="quiet">{text(caption)}</figcaption></figure>'


def panels(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and ``count`` axes of it, in rows; sizes of one in inches."""
    columns = max(min(columns, count), 1)
    figure, axes = figure_of(-(-count // columns), columns, width, height)
    flat = [axis for row in axes for axis in row]
    for axis in flat[count:]:
        axis.set_visible(False)
    for axis in flat[:count]:
        axis.grid(alpha=0.25, linewidth=0.5)
    return figure, flat[:count]


def label(name: str, longest: int = 46) -> str:
    """A name as a plot has room for it: its end."""
    name = clean(name)
    return name if len(name) <= longest else "…" + name[1 - longest :]


@contextmanager
def _settings() -> Iterator[None]:
    figure_of(1, 1)  # which says what to install where there is no matplotlib
    import matplotlib

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has more fonts
        yield


def _own(tag: str, name: str) -> str:
    """A tag with ids of its own figure and without names of XML, which HTML does not need."""
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"', "", tag)
    tag = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return tag.replace(BLACK, "currentColor")


__all__ = ["label", "panels", "picture", "save"]
