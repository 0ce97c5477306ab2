"""A table as Markdown's pipe rows; its first row is the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_MAX_COLUMNS = 100
"""More are cut off: `colspan="1000"` in every cell would make gigabytes of blanks."""
_MAX_REPEATED = 100
"""Characters up to which a cell of several rows is repeated in each, so that a row that is found
alone still says what it belongs to."""


@dataclass
class _Cell:
    parts: list[str]
    columns: int
    rows: int


@dataclass
class PipeTable:
    _rows: list[list[str]] = field(default_factory=list)
    _caption: list[str] = field(default_factory=list)
    _row: list[str] | None = None
    _cell: _Cell | None = None
    # column -> text, of cells that reach into this row from above; and (rows to come, text) of
    # those that reach further
    _due: dict[int, str] = field(default_factory=dict)
    _hanging: dict[int, tuple[int, str]] = field(default_factory=dict)

    def start_row(self) -> None:
        self.end_row()
        self._row = []
        self._due = {column: text for column, (_, text) in self._hanging.items()}
        self._hanging = {
            c: (left - 1, text) for c, (left, text) in self._hanging.items() if left > 1
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
                self._hanging[column] = (cell.rows - 1, "" if offset else repeated)
        self._row += [text] + [""] * (cell.columns - 1)
        del self._row[_MAX_COLUMNS:]

    def end_row(self) -> None:
        self.end_cell()
        row, self._row = self._row, None
        if row is not None:
            self._fill_from_above(row)
            self._rows.append(row)

    def _fill_from_above(self, row: list[str]) -> None:
        while len(row) < _MAX_COLUMNS and len(row) in self._due:
            row.append(self._due[len(row)])

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


def _span(value: str | None, most: int) -> int:
    return max(1, min(int(value[:6]), most)) if value and value.isdecimal() else 1
