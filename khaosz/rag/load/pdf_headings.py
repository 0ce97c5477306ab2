"""Headings of a PDF, which has none: lines that are set larger than what most of it is set in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from khaosz.rag.load.pdf_lines import Line

_LARGER = 1.15  # times the size of the running text
_LONGEST = 120  # characters
_LEVELS = 4
_MOST = 0.2  # of all characters: more is a poster or a slide, where size says something else
_NO_HEADING = frozenset("。，；：、,;:-\u2010")
_LEADERS = re.compile(r"(?:[.·…] ?){4}")  # of a table of contents


def heading_levels(pages: Sequence[Sequence[Line]]) -> dict[float, int]:
    """The level, from 1, of every size of letters that headings are set in; sizes as `size_of`."""
    characters: Counter[float] = Counter()
    for line in (line for page in pages for line in page if line.placed):
        characters[size_of(line)] += len(line.text)
    if not characters:
        return {}
    half, body = sum(characters.values()) / 2, 0.0
    for size in sorted(characters):
        body = size
        half -= characters[size]
        if half <= 0:
            break
    large = sorted((size for size in characters if size >= _LARGER * body), reverse=True)
    if sum(characters[size] for size in large) > _MOST * sum(characters.values()):
        return {}
    return {size: min(level, _LEVELS) for level, size in enumerate(large, 1)}


def size_of(line: Line) -> float:
    return round(line.height * 2) / 2


def with_headings(lines: Sequence[Line], levels: dict[float, int]) -> list[tuple[int, list[Line]]]:
    """A page in parts: a heading with its level, whose lines are those of one title, or lines of
    running text with 0."""

    def level(line: Line) -> int:
        text = line.text.rstrip()
        if not line.placed or len(text) > _LONGEST or not any(map(str.isalpha, text)):
            return 0
        if text[-1] in _NO_HEADING or _LEADERS.search(text):
            return 0
        return levels.get(size_of(line), 0)

    parts = [(found, list(some)) for found, some in groupby(lines, level)]
    return [
        # A large passage of many lines is a quotation.
        (found if len("".join(line.text for line in some)) <= _LONGEST else 0, some)
        for found, some in parts
    ]
