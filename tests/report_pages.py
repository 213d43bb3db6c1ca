"""What the tests of reports share: a page taken apart."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from lightning_quant.report_page.html import SCRIPT

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page's tags, and whether they are closed in the order they were opened.

    Attributes:
        tags: Names and attributes, in order.
        tables: Rows of each table, as texts.
        script: Text of all scripts.
        words: All text outside of scripts and styles.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.script = self.words = ""
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.script += data
        elif "style" not in self.open:
            self.words += data
            if self.open and self.open[-1] in ("td", "th"):
                self.tables[-1][-1][-1] += data

    @property
    def sections(self) -> list[str]:
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def rows(self, number: int = 0) -> dict[str, dict[str, str]]:
        """Cells of a table by the first column and the heading."""
        head, *rows = self.tables[number]
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}

    def check(self) -> None:
        """Nothing is loaded, nothing runs but the page's own script, every name is there once."""
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        for tag, attrs in self.tags:
            assert tag not in ("iframe", "object", "embed", "base", "img", "form", "foreignobject"), tag
            for name, value in attrs.items():
                assert not name.startswith("on"), (tag, name)
                if name in ("src", "href", "xlink:href", "action", "srcset"):
                    assert value.startswith("#") or value == "data:,", (tag, name, value)
                    assert not value.startswith("#") or value[1:] in ids, value
                assert "://" not in value, (tag, name, value)
        assert "://" not in self.source
        assert "@import" not in self.source
        assert self.count("script") == 1
        assert self.script == SCRIPT
