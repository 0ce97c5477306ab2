"""From the lines that a PDF page draws to reading order, headings and paragraphs.

A PDF says where glyphs are, not what belongs together. In doubt the lines stay as they are drawn:
in the file's order, and separate.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import median

_CJK = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef，。、；：？！“”‘’（）《》]")
_ITEM = re.compile(
    r"[•·◦▪■□●○◆–—*\-]\s|\(?\d{1,3}(?:\.\d+)*[.)、．]|[(（][一二三四五六七八九十\d]+[)）]"
    r"|[一二三四五六七八九十]+、|第[一二三四五六七八九十百零〇\d]+[章节節条條款]"
)
_MIN_COLUMN = 12  # ems: the least width of a column of running text, twelve Chinese characters
_BROKEN_WORD = re.compile(r"([^\W\d_]{2,})\u2010$")
_WORD = re.compile(r"[^\W\d_]{2,}")

# Headings are set larger than the running text.
_LARGER = 1.15  # times its size
_MAX_HEADING = 120  # characters
_MAX_LEVEL = 4
_MAX_SHARE = 0.2  # of all characters: more is a poster or a slide, where size means something else
_NOT_LAST = frozenset("。，；：、,;:-\u2010")  # a heading ends with none of these
_LEADERS = re.compile(r"(?:[.·…] ?){4}")  # of a table of contents


@dataclass(frozen=True)
class Line:
    """A line's box in points, from the page's lower left corner; `gap` is the widest one between
    two of its words. Not `placed`: its position is unknown. A hyphen at its end is U+2010."""

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
    """As drawn if that is down the page, column by column; else by cutting the page into columns
    and bands (the X-Y cut: Nagy & Seth, 1984).

    Word processors draw in reading order, forms and posters do not. A header or footer that is
    drawn last does not count against the order of the rest.
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
    return _xy_cut(lines, 0)


def _xy_cut(lines: list[Line], depth: int) -> list[Line]:
    if len(lines) > 1 and depth < 20:
        em = median(line.height for line in lines)
        columns = _split(lines, lambda line: (line.left, line.right), em)
        if len(columns) > 1:
            return [line for column in columns for line in _xy_cut(column, depth + 1)]
        bands = _split(lines, lambda line: (-line.top, -line.bottom), 0.3 * em)
        if len(bands) > 1:
            return [line for band in bands for line in _xy_cut(band, depth + 1)]
    return sorted(lines, key=lambda line: (-line.top, line.left))


def _split(
    lines: list[Line], extent: Callable[[Line], tuple[float, float]], gap: float
) -> list[list[Line]]:
    """Groups with more than `gap` of blank space between them, along one axis."""
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


def heading_levels(pages: Sequence[Sequence[Line]]) -> dict[float, int]:
    """The level, from 1, of every letter size of headings; sizes as in `size_of`."""
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
    if sum(characters[size] for size in large) > _MAX_SHARE * sum(characters.values()):
        return {}
    return {size: min(level, _MAX_LEVEL) for level, size in enumerate(large, 1)}


def size_of(line: Line) -> float:
    return round(line.height * 2) / 2


def split_headings(lines: Sequence[Line], levels: dict[float, int]) -> list[tuple[int, list[Line]]]:
    """A page as (level, lines) of headings, and (0, lines) of running text."""

    def level(line: Line) -> int:
        text = line.text.rstrip()
        if not line.placed or len(text) > _MAX_HEADING or not any(map(str.isalpha, text)):
            return 0
        if text[-1] in _NOT_LAST or _LEADERS.search(text):
            return 0
        return levels.get(size_of(line), 0)

    parts = [(number, list(part)) for number, part in groupby(lines, level)]
    return [
        # A large passage of many lines is a quotation.
        (number if sum(len(line.text) for line in part) <= _MAX_HEADING else 0, part)
        for number, part in parts
    ]


def join_lines(lines: Sequence[Line], compounds: Set[str]) -> str:
    """A page's text: wrapped lines joined, and a blank line between paragraphs that have space
    between them. `compounds` are words that have a hyphen within a line somewhere in the file."""
    if not lines:
        return ""
    margins = _right_margins(lines)
    text = [lines[0].text]
    for before, line, margin in zip(lines, lines[1:], margins, strict=False):
        joined = _without_hyphen(before.text, line.text, compounds)
        if joined is not None and _same_size(before, line):
            text[-1] = joined
            text.append(line.text)
            continue
        if _is_wrapped(before, line, margin):
            chinese = _CJK.match(before.text[-1]) and _CJK.match(line.text[0])
            separator = "" if chinese or before.text.endswith("\u2010") else " "
        else:
            separator = "\n\n" if _is_apart(before, line) else "\n"
        text += [separator, line.text]
    return "".join(text).replace("\u2010", "-")


def _without_hyphen(before: str, line: str, compounds: Set[str]) -> str | None:
    """The line before without its hyphen (or with it, if the word has one elsewhere); None if no
    word is broken between the lines: a broken word continues in lower case."""
    start = _BROKEN_WORD.search(before)
    rest = _WORD.match(line)
    if not start or not rest or not rest[0][0].islower():
        return None
    # "state-of-the-" has other hyphens; "well-known" has its hyphen elsewhere in the file.
    has_other = before[: start.start()].endswith("-")
    if has_other or f"{start[1]}-{rest[0]}".lower() in compounds:
        return before[:-1] + "-"
    return before[:-1]


def _right_margins(lines: Sequence[Line]) -> list[float]:
    """For each line the right edge of its run of lines."""
    margins = [0.0] * len(lines)
    start = 0
    for end in range(1, len(lines) + 1):
        if end == len(lines) or not _continues(lines[end - 1], lines[end]):
            margins[start:end] = [max(line.right for line in lines[start:end])] * (end - start)
            start = end
    return margins


def _continues(before: Line, line: Line) -> bool:
    """Whether a line is below another as its next one would be: same size, close, aligned."""
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
    """Whether the line before ended because the next word did not fit."""
    em = before.height
    if not _continues(before, line) or max(before.gap, line.gap) > 2 * em:
        return False  # a wide gap: a row of a table, or a form
    if _ITEM.match(line.text) or line.left > before.left + 0.8 * em:
        return False  # a list item, or the indent of a first line
    if margin - min(before.left, line.left) < _MIN_COLUMN * em:
        return False  # a poem, a list of names
    word = line.text.split(maxsplit=1)[0]
    if _CJK.match(word):
        word = word[:2]  # punctuation never starts a line, so its character moves with it
    needed = (line.right - line.left) / len(line.text) * (len(word) + 1)
    return before.right + needed > margin


def _is_apart(before: Line, line: Line) -> bool:
    """Whether more than a line's space is between them, or their sizes differ."""
    if not (before.placed and line.placed):
        return False
    return not _same_size(before, line) or before.bottom - line.top > 0.8 * line.height
