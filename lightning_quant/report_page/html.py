"""The few pieces of HTML that a page is made of.  Whatever comes from a file goes through ``text``."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --quiet: #737373; --good: #1a7f37; --bad: #c62828;
  --accent: #2f6fdd; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff7b72; --quiet: #a0a0a0; --accent: #7aa7ff; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: 1rem; color: var(--accent); }
p { margin: .5rem 0; } .quiet { color: var(--quiet); font-size: .9rem; } code { overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; overflow-wrap: anywhere; }
.card b { display: block; font-size: 1.15rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.worst { border-left: 4px solid var(--bad); background: var(--soft); padding: .5rem .75rem; }
.wide { overflow-x: auto; } .long { max-height: 40rem; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } th { vertical-align: bottom; position: sticky; top: 0; background: Canvas; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
table.sortable th { cursor: pointer; } table.sortable th::after { content: "\\00a0\\2195"; color: var(--quiet); }
pre { background: var(--soft); padding: .6rem .8rem; overflow-x: auto; border-radius: .4rem; font-size: .85rem; }
figure { margin: 1rem 0; overflow-x: auto; } svg { max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; fill: currentColor; }
dl { font-size: .9rem; } dt { font-weight: 600; float: left; clear: left; margin-right: .5rem; }
dd { margin: 0 0 .2rem; }
"""
SCRIPT = """
for (const th of document.querySelectorAll('table.sortable th')) th.addEventListener('click', () => {
  const body = th.closest('table').tBodies[0], down = th.dataset.down !== '1';
  const key = row => { const d = row.cells[th.cellIndex].dataset; return d.v === undefined ? null : d.v; };
  const worth = v => v === null ? -Infinity : (v === '' || isNaN(v)) ? v : Number(v);
  th.dataset.down = down ? '1' : '0';
  [...body.rows].map(r => [worth(key(r)), r]).sort(([a], [b]) => (a < b ? 1 : a > b ? -1 : 0) * (down ? 1 : -1))
    .forEach(([, r]) => body.append(r));
});
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and what it is sorted by."""

    shown: str
    value: float | str | None = None


def clean(value: object) -> str:
    """Text without what does not print: controls, marks that turn the direction of writing, lone surrogates."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def text(value: object) -> str:
    """Any text as HTML shows it, in an element or in an attribute.

    >>> text("<b> & 'c'")
    '&lt;b&gt; &amp; &#x27;c&#x27;'
    """
    return html.escape(clean(value))


def block(value: str) -> str:
    """Lines of text as they are."""
    return f"<pre>{chr(10).join(text(line) for line in value.splitlines())}</pre>"


def paragraph(*parts: str, kind: str = "") -> str:
    """A paragraph of HTML."""
    return f"<p{_class(kind)}>{' '.join(parts)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], sortable: bool = False) -> str:
    """A table of texts.

    Args:
        head: Names of the columns.
        rows: Their cells.
        sortable: Whether a click on a name sorts the rows.
    """
    names = "".join(f"<th>{text(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    whole = (
        f"<table{_class('sortable' if sortable else '')}><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"
    )
    return f'<div class="wide long">{whole}</div>'


def _cell(cell: Cell) -> str:
    key = "" if cell.value is None else f' data-v="{text(cell.value)}"'
    return f"<td{key}>{text(cell.shown)}</td>"


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """Names and what they mean, both texts."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(what)}</dd>" for name, what in items) + "</dl>"


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Boxes of a name, a figure (both texts) and a class."""
    boxes = (f'<div class="card">{text(name)}<b{_class(kind)}>{text(figure)}</b></div>' for name, figure, kind in items)
    return f'<div class="cards">{"".join(boxes)}</div>'


def section(name: str, title: str, *parts: str) -> str:
    """A section of HTML that the list at the top leads to."""
    return f'<section id="{name}"><h2>{text(title)}</h2>\n{chr(10).join(parts)}\n</section>'


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page, which may load nothing and run nothing but its own few lines.

    Args:
        title: Text.
        head: HTML before the sections.
        sections: Name, title and HTML of each.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    links = "".join(f'<a href="#{name}">{text(shown)}</a>' for name, shown, _ in sections)
    body = "\n".join(whole for _, _, whole in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title>\n<style>{STYLE}</style></head>\n'
        f"<body><h1>{text(title)}</h1>\n{head}\n<nav>{links}</nav>\n{body}\n<script>{SCRIPT}</script></body></html>\n"
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
