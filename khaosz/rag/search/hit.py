"""The passages that a search returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

Mode = Literal["lexical", "dense", "hybrid"]
_QUOTED = 40  # characters


@dataclass(frozen=True, slots=True)
class RetrieverScore:
    """Rank, from 1, and score of a chunk in the results of one retriever."""

    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage: `text` is characters `start` to `end` of the document whose text has the SHA-256
    `hash`. legs: by retriever ("lexical", "dense", "rerank"), for the best chunk in the passage.
    Scores are only comparable within one search. page, page_end: of a PDF. line, line_end: of a
    file whose text is stored as it is. All count from 1, without blank lines around the text."""

    chunk: int
    doc_id: str
    doc: str
    hash: str
    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    score: float
    legs: dict[str, RetrieverScore]
    page: int | None = None
    collection: str = ""
    page_end: int | None = None
    line: int | None = None
    line_end: int | None = None

    @property
    def place(self) -> str:
        pages, lines = (self.page, self.page_end), (self.line, self.line_end)
        return location(self.doc, self.headings, self.text, pages, lines)

    def part(self, start: int, end: int) -> Hit:
        """Characters `start` to `end` of the passage's text."""
        text = self.text[start:end]
        place = replace(self, start=self.start + start, end=self.start + end, text=text)
        if self.line is None or self.line == self.line_end:
            return place
        first = self.line - line_breaks(blank_start(self.text)) + line_breaks(self.text[:start])
        line, line_end = visible_lines(text, first)
        return replace(place, line=line, line_end=line_end)

    def as_dict(self) -> dict[str, object]:
        return {
            "doc_id": self.doc_id,
            "doc": self.doc,
            "hash": self.hash,
            "start": self.start,
            "end": self.end,
            "page": self.page,
            "page_end": self.page_end,
            "line": self.line,
            "line_end": self.line_end,
            "headings": list(self.headings),
            "score": self.score,
            "legs": {name: asdict(result) for name, result in self.legs.items()},
            "text": self.text,
        }


def line_breaks(text: str) -> int:
    """As editors count them, in a text that was read: "\\r\\n" is "\\n" in it."""
    return text.count("\n") + text.count("\r")


def blank_start(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def visible_lines(text: str, first: int) -> tuple[int, int]:
    """The first and the last line that is not blank; `text` starts in line `first`."""
    return first + line_breaks(blank_start(text)), first + line_breaks(text.rstrip())


def location(
    doc: str,
    headings: Sequence[str],
    text: str,
    pages: tuple[int | None, int | None],
    lines: tuple[int | None, int | None],
) -> str:
    """Where to find a passage, for people: the document, the headings above it, and pages or lines.
    Where none of them is known, as in a Word file, its first words, which can be searched for."""
    place = " > ".join((doc, *headings))
    if pages[0] is not None:
        return f"{place}, {_span('p. ', 'pp. ', pages[0], pages[1])}"
    if lines[0] is not None:
        return f"{place}, {_span('line ', 'lines ', lines[0], lines[1])}"
    words = " ".join(text[:_QUOTED].split())
    more = "..." if len(text.strip()) > _QUOTED else ""
    return place if headings or not words else f'{place}, "{words}{more}"'


def _span(one: str, several: str, first: int, last: int | None) -> str:
    return f"{one}{first:,}" if last in (None, first) else f"{several}{first:,}-{last:,}"
