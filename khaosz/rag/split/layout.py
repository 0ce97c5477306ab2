"""The structure of a text that a splitter needs: headings, code blocks, tables.

Markdown by CommonMark 0.31 (ATX and setext headings, fences) with GitHub's tables, and headings of
Chinese books, laws and manuals (`第三章 总则`). One regular expression finds all lines that may be
one of them; in prose it only stops at line breaks.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import takewhile
from re import Match

from khaosz.rag.split.sentence import CLOSING

_MARKED_LINE = re.compile(
    r"""\n(?=[ \t\u3000\#`~=|第-])(?:
        [ ]{0,3}(?P<atx>\#{1,6})(?:[ \t]+(?P<title>[^\n]*+))?+(?=\n|\Z)
      | [ ]{0,3}(?P<fence>`{3,}+|~{3,}+)(?P<info>[^\n]*+)
      | [ ]{0,3}(?P<rule>=++|-++)[ \t]*+(?=\n|\Z)
      | [ \t]*+(?P<row>\|)[^\n]*+
      | [ \t\u3000]*+第[ ]?(?:[0-9]{1,4}|[零〇一二三四五六七八九十百千两]{1,7})[ ]?
        (?P<unit>[编篇部卷章回节])(?P<rest>[^\n。！？；，,.!?;]{0,50}+)(?=\n|\Z)
    )""",
    re.VERBOSE,
)
# Below the six levels of Markdown: the chapters of a law are under the title of its document.
_UNITS = {"编": 7, "篇": 7, "部": 7, "卷": 7, "章": 8, "回": 8, "节": 9}
# These open lines that are not underlined titles: other marks, and reStructuredText's fields.
_NOT_TITLE = CLOSING | set("#|>`~-*+")


@dataclass(slots=True)
class Layout:
    """Sections and blocks in order; positions are in characters.

    `starts[i]` is where the section under the headings `paths[i]` starts; the first is 0.
    `bare[i]`: the section is empty, its heading is followed by the next. `blocks` are the code
    blocks and tables as (start, end); they do not overlap.
    """

    starts: list[int] = field(default_factory=lambda: [0])
    paths: list[tuple[str, ...]] = field(default_factory=lambda: [()])
    bare: list[bool] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)

    def path(self, start: int, end: int) -> tuple[str, ...]:
        """The headings above all of text[start:end], outermost first."""
        first = bisect_right(self.starts, start) - 1
        last = bisect_left(self.starts, end, first + 1) - 1
        while first < last and self.bare[first]:
            first += 1  # a heading with only the next one under it
        levels = zip(*self.paths[first : last + 1], strict=False)
        shared = takewhile(lambda titles: len(set(titles)) == 1, levels)
        return tuple(titles[0] for titles in shared)

    def block_at(self, position: int) -> tuple[int, int] | None:
        """The block that a cut at `position` would divide."""
        index = bisect_left(self.blocks, (position, 0)) - 1
        if index >= 0 and position < self.blocks[index][1]:
            return self.blocks[index]
        return None


def find_layout(text: str) -> Layout | None:
    """None for a text that is only prose."""
    lines = "\n" + text  # so that a break is before the first line, too
    match = _MARKED_LINE.search(lines)
    if match is None:
        return None
    return _Reader(lines).read(match)


class _Reader:
    """One pass over the marked lines. Positions in `lines` are one more than in the text, so the
    position of a line's leading break in `lines` is the position of the line in the text."""

    def __init__(self, lines: str) -> None:
        self.lines = lines
        self.layout = Layout()
        self.stack: list[tuple[int, str]] = []
        self.bodies = [0]  # where the heading line of each section ends
        self.rows = (0, 0, 0)  # start, end and number of the last table rows

    def read(self, match: Match[str] | None) -> Layout:
        position = 0
        while match is not None:
            position = match.end()
            start = match.start()
            if match["atx"]:
                title = (match["title"] or "").strip()
                title = re.sub(r"(?:^|[ \t]+)#+$", "", title)
                self._heading(start, position, len(match["atx"]), title)
            elif match["fence"]:
                position = self._fence(start, position, match["fence"], match["info"])
            elif match["rule"]:
                self._setext(start, position, match["rule"][0])
            elif match["row"]:
                self._row(start, position)
            else:
                title = " ".join(match[0].split())
                self._heading(start, position, _UNITS[match["unit"]], title)
            match = _MARKED_LINE.search(self.lines, position)
        self._end_table()
        layout = self.layout
        # In `lines` a section ends one later, at the break before the next heading.
        layout.bare = [
            not self.lines[body:end].strip()
            for body, end in zip(self.bodies, layout.starts[1:], strict=False)
        ]
        layout.bare.append(False)
        return layout

    def _heading(self, start: int, end: int, level: int, title: str) -> None:
        self._end_table()
        while self.stack and self.stack[-1][0] >= level:
            self.stack.pop()
        if title:
            self.stack.append((level, title))
        layout = self.layout
        path = tuple(title for _, title in self.stack)
        if start == layout.starts[-1]:
            layout.paths[-1], self.bodies[-1] = path, end
        else:
            layout.starts.append(start)
            layout.paths.append(path)
            self.bodies.append(end)

    def _setext(self, start: int, end: int, mark: str) -> None:
        """A single line of text under a blank line, underlined; else a rule or front matter."""
        lines = self.lines
        above = lines.rfind("\n", 0, start)
        if above < 0 or start - above > 200:
            return
        title = lines[above + 1 : start].strip()
        blank_before = above == 0 or lines[lines.rfind("\n", 0, above) + 1 : above].isspace()
        blank_before = blank_before or lines[above - 1 : above] == "\n"
        if title and blank_before and title[0] not in _NOT_TITLE:
            self._heading(above, end, 1 if mark == "=" else 2, title)

    def _fence(self, start: int, end: int, fence: str, info: str) -> int:
        """Adds the block; returns where reading continues."""
        if fence[0] == "`" and "`" in info:
            return end  # a code span, not a fence
        self._end_table()
        close = re.compile(rf"\n {{0,3}}{fence[0]}{{{len(fence)},}}+[ \t]*+(?=\n|\Z)")
        match = close.search(self.lines, end)
        stop = match.end() if match else len(self.lines)
        # In the text the break that ends the closing line is at stop - 1, and belongs to the block.
        self.layout.blocks.append((start, min(stop, len(self.lines) - 1)))
        return stop

    def _row(self, start: int, end: int) -> None:
        first, last, count = self.rows
        end = min(end, len(self.lines) - 1)
        if count and last == start:
            self.rows = (first, end, count + 1)
        else:
            self._end_table()
            self.rows = (start, end, 1)

    def _end_table(self) -> None:
        start, end, count = self.rows
        if count > 1:
            self.layout.blocks.append((start, end))
        self.rows = (0, 0, 0)
