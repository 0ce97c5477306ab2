"""Markdown from the elements of an HTML page, one event after the other.

Headings, lists, quotes, fenced code and tables; no emphasis and no link targets, which do not help
a search and separate the words of a citation. Tables become GitHub's pipe tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_BLOCKS = frozenset(
    (
        *("address", "article", "aside", "body", "center", "details", "dialog", "div", "fieldset"),
        *("figcaption", "figure", "footer", "form", "header", "hgroup", "hr", "html", "legend"),
        *("main", "p", "section", "summary", "blockquote", "pre", "h1", "h2", "h3", "h4", "h5"),
        *("h6", "ul", "ol", "menu", "li", "dl", "dt", "dd", "table", "caption", "thead", "tbody"),
        *("tfoot", "tr", "td", "th"),
    )
)
_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_CJK = "\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"
# A line end within Chinese text is not a space (CSS Text 3, 4.1.3); `sub` is linear on both.
_CJK_LINE_END = re.compile(rf"(?<=[{_CJK}])[ \t\r\f]*\n\s*(?=[{_CJK}])")
_SPACE = re.compile(r"[ \t\n\r\f\xa0]+")
_SPACE_RUN = re.compile(r" {2,}")
_AROUND_BREAK = re.compile(r" *\n *")
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
_LANGUAGE = re.compile(r"(?:^|\s)(?:lang|language|highlight-source)-([\w+#-]+)")
# Text that starts a heading, a fence or a table row at the start of a line.
_STRUCTURE = re.compile(r"^(?=#{1,6}(?:\s|$)|```|~~~|\|)", re.M)
_MAX_DEPTH = 8
"""Of lists and quotes inside each other; deeper ones count as the eighth."""
_MAX_COLUMNS = 100
"""Of a table; more are cut off: `colspan="1000"` in every cell would make gigabytes of blanks."""
_MAX_REPEATED = 100
"""Characters up to which a cell of several rows is repeated in each row, so that a row that is
retrieved alone still says what it belongs to."""


def escape(text: str) -> str:
    """Text with a backslash before what Markdown reads as a heading, fence or table row."""
    return _STRUCTURE.sub(r"\\", text)


@dataclass
class _Container:
    """A quote (`marker` "> "), a list (no marker) or a list item, `started` if it has text."""

    tag: str
    marker: str = ""
    started: bool = False
    number: int | None = None


@dataclass
class MarkdownWriter:
    _parts: list[str] = field(default_factory=list)
    _inline: list[str] = field(default_factory=list)
    _containers: list[_Container] = field(default_factory=list)
    _pre: list[str] | None = None
    _pre_depth: int = 0
    _language: str = ""
    _table: _Table | None = None
    _after_item: bool = False

    def text(self, text: str) -> None:
        if self._pre is not None:
            self._pre.append(text)
        else:
            self._inline.append(_SPACE.sub(" ", _CJK_LINE_END.sub("", text)))

    def start(self, tag: str, attributes: Mapping[str, str | None], is_layout: bool) -> None:
        if self._pre is not None:
            self._start_in_pre(tag, attributes)
            return
        if tag in _BLOCKS:
            self._flush()
        match tag:
            case "br":
                self._inline.append("\n")
            case "code":
                self._inline.append("`")
            case "pre" if self._table is None:
                self._pre = []
                self._language = _language(attributes)
            case "table" if not is_layout:
                self._table = _Table()
            case "tr" if self._table:
                self._table.start_row()
            case "td" | "th" if self._table:
                self._table.start_cell(attributes)
            case "blockquote":
                self._containers.append(_Container(tag, "> "))
            case "ul" | "ol" | "menu":
                first = attributes.get("start") or "1"
                number = int(first[:9]) if first.isdecimal() else 1
                self._containers.append(_Container(tag, number=number if tag == "ol" else None))
            case "li":
                self._containers.append(_Container(tag, self._marker()))

    def _start_in_pre(self, tag: str, attributes: Mapping[str, str | None]) -> None:
        assert self._pre is not None
        if tag == "pre":
            self._pre_depth += 1
        elif tag == "br":
            self._pre.append("\n")
        elif tag == "code" and not self._language:
            self._language = _language(attributes)

    def end(self, tag: str) -> None:
        if self._pre is not None:
            if tag == "pre" and self._pre_depth:
                self._pre_depth -= 1
            elif tag == "pre":
                self._end_pre()
            return
        if tag in _HEADINGS:
            self._flush(_HEADINGS[tag])
        elif tag in _BLOCKS:
            self._flush()
        match tag:
            case "code":
                if self._inline[-1:] == ["`"]:
                    self._inline.pop()
                else:
                    self._inline.append("`")
            case "tr" if self._table:
                self._table.end_row()
            case "td" | "th" if self._table:
                self._table.end_cell()
            case "table" if self._table:
                table, self._table = self._table, None
                for block in table.blocks():
                    self._emit(block)
            case "blockquote" | "ul" | "ol" | "menu" | "li":
                self._containers.pop()

    def finish(self) -> str:
        self._flush()
        return "".join(self._parts)

    def _marker(self) -> str:
        around = self._containers[-1] if self._containers else None
        if around is None or around.number is None:
            return "- "
        around.number += 1
        return f"{around.number - 1}. "

    def _flush(self, heading: int = 0) -> None:
        """Writes the text since the last block as a block."""
        if not self._inline:
            return
        text = "".join(self._inline).translate(_INVISIBLE)
        self._inline.clear()
        text = _AROUND_BREAK.sub("\n", _SPACE_RUN.sub(" ", text)).strip()
        if not text:
            return
        if self._table:
            self._table.add_text(text)
        elif heading:
            self._emit("#" * heading + " " + text.replace("\n", " "))
        else:
            for paragraph in re.split(r"\n{2,}", text):
                self._emit(escape(paragraph))

    def _end_pre(self) -> None:
        assert self._pre is not None
        code = "".join(self._pre).replace("\xa0", " ").strip("\n").rstrip()
        language, self._pre, self._language = self._language, None, ""
        if code:
            longest = max((len(run) for run in re.findall(r"^\s*(`+)", code, re.M)), default=0)
            fence = "`" * max(3, longest + 1)
            self._emit(f"{fence}{language}\n{code}\n{fence}")

    def _emit(self, block: str) -> None:
        first, rest, starts_item = "", "", False
        items = [c for c in self._containers if c.marker]
        for container in items[:_MAX_DEPTH]:
            indent = container.marker if container.tag != "li" else " " * len(container.marker)
            if container.tag == "li" and not container.started:
                first += container.marker
                container.started = starts_item = True
            else:
                first += indent
            rest += indent
        if self._parts:
            self._parts.append("\n" if starts_item and self._after_item else "\n\n")
        self._after_item = any(container.tag == "li" for container in items)
        lines = block.split("\n")
        self._parts.append(first + f"\n{rest}".join(lines))


def _language(attributes: Mapping[str, str | None]) -> str:
    match = _LANGUAGE.search(attributes.get("class") or "")
    return match[1] if match else ""


@dataclass
class _Cell:
    parts: list[str]
    columns: int
    rows: int


@dataclass
class _Table:
    _rows: list[list[str]] = field(default_factory=list)
    _caption: list[str] = field(default_factory=list)
    _row: list[str] | None = None
    _cell: _Cell | None = None
    # column -> text, of cells that reach into this row from above; and (rows left, text) of cells
    # that reach into later rows
    _from_above: dict[int, str] = field(default_factory=dict)
    _spanning: dict[int, tuple[int, str]] = field(default_factory=dict)

    def start_row(self) -> None:
        self.end_row()
        self._row = []
        self._from_above = {column: text for column, (_, text) in self._spanning.items()}
        self._spanning = {
            c: (left - 1, text) for c, (left, text) in self._spanning.items() if left > 1
        }

    def start_cell(self, attributes: Mapping[str, str | None]) -> None:
        self.end_cell()
        columns = _span(attributes.get("colspan"), _MAX_COLUMNS)
        self._cell = _Cell([], columns, _span(attributes.get("rowspan"), 65534))

    def add_text(self, text: str) -> None:
        (self._cell.parts if self._cell else self._caption).append(text)

    def end_cell(self) -> None:
        cell, self._cell = self._cell, None
        if cell is None:
            return
        if self._row is None:
            self.start_row()
        assert self._row is not None
        self._fill_from_above(self._row)
        text = " ".join(" ".join(cell.parts).split()).replace("|", "\\|")
        if cell.rows > 1:
            repeated = text if len(text) <= _MAX_REPEATED else ""
            for offset in range(cell.columns):
                column = len(self._row) + offset
                self._spanning[column] = (cell.rows - 1, "" if offset else repeated)
        self._row += [text] + [""] * (cell.columns - 1)
        del self._row[_MAX_COLUMNS:]

    def end_row(self) -> None:
        self.end_cell()
        row, self._row = self._row, None
        if row is not None:
            self._fill_from_above(row)
            self._rows.append(row)

    def _fill_from_above(self, row: list[str]) -> None:
        while len(row) < _MAX_COLUMNS and len(row) in self._from_above:
            row.append(self._from_above[len(row)])

    def blocks(self) -> Iterator[str]:
        """The caption and the table; a table of one column is paragraphs."""
        self.end_row()
        if self._caption:
            yield " ".join(" ".join(self._caption).split())
        rows = [row for row in self._rows if any(row)]
        width = max(map(len, rows), default=0)
        if width <= 1:
            for row in rows:
                yield row[0]
            return
        lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
        lines.insert(1, "|" + " --- |" * width)
        yield "\n".join(lines)


def _span(value: str | None, maximum: int) -> int:
    return max(1, min(int(value[:6]), maximum)) if value and value.isdecimal() else 1
