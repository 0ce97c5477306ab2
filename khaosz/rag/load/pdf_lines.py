"""From the lines a PDF page draws to the paragraphs a reader sees.

A PDF says where glyphs are, not what belongs together. Where in doubt the lines stay as they are
drawn: in the file's order, and apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median

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


_CJK = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef，。、；：？！“”‘’（）《》]")
_ITEM = re.compile(
    r"[•·◦▪■□●○◆–—*\-]\s|\(?\d{1,3}(?:\.\d+)*[.)、．]|[(（][一二三四五六七八九十\d]+[)）]"
    r"|[一二三四五六七八九十]+、|第[一二三四五六七八九十百零〇\d]+[章节節条條款]"
)
_NARROWEST = 12
"""The least width of a column of running text, in ems: twelve Chinese characters."""
_BROKEN_WORD = re.compile(r"([^\W\d_]{2,})\u2010$")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class Line:
    """A line's box in points, from the page's lower left corner; `gap` is the widest one between
    two of its words. Not `placed`: we don't know where it is. A hyphen at its end is U+2010."""

    text: str
    left: float = 0.0
    bottom: float = 0.0
    right: float = 0.0
    top: float = 0.0
    gap: float = 0.0
    placed: bool = True

    @property
    def height(self) -> float:
        return self.top - self.bottom


def in_reading_order(lines: list[Line]) -> list[Line]:
    """As drawn when that goes down the page, column by column; else by cutting the page into
    columns and bands (the X-Y cut: Nagy & Seth, 1984).

    Word processors draw in reading order, forms and posters do not. A header or footer that is
    drawn last is no reason to distrust the rest.
    """
    if not all(line.placed for line in lines):
        return lines
    jumps = 0
    for before, line in pairwise(lines):
        upwards = line.bottom >= before.top - 0.3 * before.height
        to_the_left = line.left < before.right and upwards
        beside = not upwards and line.top > before.bottom + 0.5 * line.height
        jumps += to_the_left or (beside and line.right <= before.left)
    if jumps <= 2 or jumps * 10 < len(lines):
        return lines
    return _cut(lines, 0)


def _cut(lines: list[Line], depth: int) -> list[Line]:
    if len(lines) > 1 and depth < 20:
        em = median(line.height for line in lines)
        columns = _split(lines, lambda line: (line.left, line.right), em)
        if len(columns) > 1:
            return [line for column in columns for line in _cut(column, depth + 1)]
        bands = _split(lines, lambda line: (-line.top, -line.bottom), 0.3 * em)
        if len(bands) > 1:
            return [line for band in bands for line in _cut(band, depth + 1)]
    return sorted(lines, key=lambda line: (-line.top, line.left))


def _split(
    lines: list[Line], extent: Callable[[Line], tuple[float, float]], gap: float
) -> list[list[Line]]:
    """Groups with more than `gap` of nothing between them, along one axis."""
    groups: list[list[Line]] = []
    end = 0.0
    for line in sorted(lines, key=extent):
        start, stop = extent(line)
        if not groups or start > end + gap:
            groups.append([])
            end = stop
        groups[-1].append(line)
        end = max(end, stop)
    return groups


def join_lines(lines: Sequence[Line], compounds: Set[str]) -> str:
    """A page's text: wrapped lines joined, paragraphs apart by a blank line where there is space
    between them. `compounds` are words that have a hyphen within a line somewhere in the file."""
    if not lines:
        return ""
    margins = _right_margins(lines)
    text = [lines[0].text]
    for before, line, margin in zip(lines, lines[1:], margins, strict=False):
        hyphenated = _without_hyphen(before.text, line.text, compounds)
        if hyphenated is not None and _same_size(before, line):
            text[-1] = hyphenated
            text.append(line.text)
            continue
        if _is_wrapped(before, line, margin):
            chinese = _CJK.match(before.text[-1]) and _CJK.match(line.text[0])
            apart = "" if chinese or before.text.endswith("\u2010") else " "
        else:
            apart = "\n\n" if _is_apart(before, line) else "\n"
        text += [apart, line.text]
    return "".join(text).replace("\u2010", "-")


def _without_hyphen(before: str, line: str, compounds: Set[str]) -> str | None:
    """The line before without its hyphen (or with, when the word has one elsewhere); None when
    there is no broken word: one that goes on in lower case."""
    start = _BROKEN_WORD.search(before)
    rest = _WORD.match(line)
    if not start or not rest or not rest[0][0].islower():
        return None
    # "state-of-the-" has hyphens of its own; "well-known" was seen with its hyphen elsewhere.
    own = before[: start.start()].endswith("-")
    if own or f"{start[1]}-{rest[0]}".lower() in compounds:
        return before[:-1] + "-"
    return before[:-1]


def _right_margins(lines: Sequence[Line]) -> list[float]:
    """For each line the right edge of the run of lines it is in."""
    margins = [0.0] * len(lines)
    start = 0
    for end in range(1, len(lines) + 1):
        if end == len(lines) or not _continues(lines[end - 1], lines[end]):
            margins[start:end] = [max(line.right for line in lines[start:end])] * (end - start)
            start = end
    return margins


def _continues(before: Line, line: Line) -> bool:
    """Whether a line stands below another as its next one would: same size, close, in line."""
    return (
        before.placed
        and line.placed
        and _same_size(before, line)
        and line.top < before.top
        and before.bottom - line.top < 1.2 * max(before.height, line.height)
        and abs(line.left - before.left) < 4 * before.height
    )


def _same_size(before: Line, line: Line) -> bool:
    return abs(before.height - line.height) <= 0.35 * max(before.height, line.height)


def _is_wrapped(before: Line, line: Line, margin: float) -> bool:
    """Whether the line before ended because the next word had no room."""
    em = before.height
    if not _continues(before, line) or max(before.gap, line.gap) > 2 * em:
        return False  # a wide gap is a row of a table, or a form
    if _ITEM.match(line.text) or line.left > before.left + 0.8 * em:
        return False  # a list's item; a first line's indent
    if margin - min(before.left, line.left) < _NARROWEST * em:
        return False  # a poem, a list of names
    word = line.text.split(maxsplit=1)[0]
    if _CJK.match(word):
        word = word[:2]  # a punctuation mark never begins a line and takes its character along
    needed = (line.right - line.left) / len(line.text) * (len(word) + 1)
    return before.right + needed > margin


def _is_apart(before: Line, line: Line) -> bool:
    """Whether there is more than a line's space between them, or another size of letters."""
    if not (before.placed and line.placed):
        return False
    return not _same_size(before, line) or before.bottom - line.top > 0.8 * line.height
