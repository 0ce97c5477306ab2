"""Cuts a text into chunks that read as pieces of it: by headings, paragraphs, then sentences.

A chunk is filled greedily and cut at the best place in its window: before a code block or table
that would be torn, at a paragraph, at a sentence, a line, a clause, a word, a character. Only the
window is looked at, so a text takes time in proportion to its length whatever is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from khaosz.errors import ConfigError
from khaosz.rag.split import sentence
from khaosz.rag.split.cut import last_prose_cut
from khaosz.rag.split.layout import Layout, find_layout

# A section shorter than this part of the budget is joined to the next one.
_SECTION_FROM = 0.3
_TRIES = 20  # earlier ends of a chunk that are looked at before one is taken as it is
_BLANK = 1000  # characters of blank space behind which the next chunk's first mark is looked for


class Chunk(NamedTuple):
    """`text` is text[start:end] of what was split, in characters; `headings` are those under which
    all of it stands, outermost first. A NamedTuple: making a frozen dataclass takes three times
    as long, as long as finding the chunk."""

    start: int
    end: int
    text: str
    headings: tuple[str, ...]


class StructureSplitter:
    """Chunks of at most `max_chars` characters, or `max_tokens` tokens as `count_tokens` counts.

    `overlap`, in the same unit, is how much of a chunk the next one may repeat; it opens at a
    sentence. Without overlap the chunks tile the text. Raises ConfigError for a budget that cannot
    be kept.
    """

    def __init__(
        self,
        max_chars: int | None = None,
        max_tokens: int | None = None,
        overlap: int = 0,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        if max_chars is not None and max_tokens is not None:
            raise ConfigError(
                "a splitter has one budget, not max_chars and max_tokens both",
                hint="leave one of them out",
            )
        if max_tokens is None:
            if count_tokens is not None:
                raise ConfigError(
                    "count_tokens without max_tokens", hint="give the budget as max_tokens"
                )
            budget = 800 if max_chars is None else max_chars
        elif count_tokens is None:
            raise ConfigError(
                "max_tokens without count_tokens",
                hint="pass a function that counts the tokens of a text, e.g. of your tokenizer",
            )
        else:
            budget = max_tokens
        if budget < 1:
            raise ConfigError(
                f"a chunk of {budget} is no chunk", hint="use 1 or more; 800 is usual"
            )
        if not 0 <= overlap <= budget // 2:
            raise ConfigError(
                f"overlap {overlap} with chunks of {budget}", hint="use 0 to half of the chunk"
            )
        self._size = budget
        self._overlap = overlap
        self._count = count_tokens

    def split(self, text: str) -> list[Chunk]:
        """The chunks in order; none of an empty text. Positions are in characters."""
        if not text:
            return []
        layout = find_layout(text)
        if self._count is not None:
            budget: Characters = Tokens(self._size, self._overlap, self._count)
        elif layout is None and len(text) <= self._size:
            return [Chunk(0, len(text), text, ())]  # most documents of some collections
        else:
            budget = Characters(self._size, self._overlap)
        if layout is None:
            return fill(text, 0, len(text), budget, None, [])
        chunks: list[Chunk] = []
        for start, end in _sections(text, layout, budget):
            fill(text, start, end, budget, layout, chunks)
        return chunks


class Characters:
    """The budget in characters: how far a chunk that opens at `start` may reach."""

    def __init__(self, size: int, overlap: int) -> None:
        self.size = size
        self.overlap = overlap

    def reach(self, text: str, start: int, end: int) -> int:
        """The furthest end, at most `end`, that keeps the budget."""
        return min(start + self.size, end)

    def kept(self, text: str, start: int, end: int) -> bool:
        return end - start <= self.size

    def back(self, text: str, start: int, end: int) -> int:
        """Where the overlap of the chunk text[start:end] may open at the earliest."""
        return end - self.overlap


class Tokens(Characters):
    """The budget in tokens. How many characters a token takes is remembered from one chunk to the
    next, so that two or three counts find the place."""

    def __init__(self, size: int, overlap: int, count: Callable[[str], int]) -> None:
        super().__init__(size, overlap)
        self.count = count
        self.ratio = 2.0  # characters per token

    def reach(self, text: str, start: int, end: int) -> int:
        fits, fails = start, end + 1
        guess = start + max(1, int(self.size * self.ratio))
        while fails - fits > 1:
            guess = min(max(guess, fits + 1), fails - 1)
            tokens = self.count(text[start:guess])
            if tokens <= self.size:
                fits = guess
                # Closer than this is not worth another count.
                if tokens >= 0.95 * self.size:
                    break
                guess = start + int((guess - start) * min(2.0, self.size / max(tokens, 1)) * 0.99)
            else:
                fails = guess
                if fails == start + 1:
                    raise ConfigError(
                        f"{text[start:fails]!r} alone takes {tokens} tokens, the budget is"
                        f" {self.size}",
                        hint="raise max_tokens",
                    )
                guess = start + int((guess - start) * min(0.97, self.size / tokens))
        self.ratio = 0.5 * self.ratio + 0.5 * (fits - start) / self.size
        return fits

    def kept(self, text: str, start: int, end: int) -> bool:
        # A token is at least a byte nearly always; what is far too long is not counted at all.
        if end - start > 40 * self.size:
            return False
        return self.count(text[start:end]) <= self.size

    def back(self, text: str, start: int, end: int) -> int:
        step = int(self.overlap * self.ratio)
        while step > 0 and self.count(text[end - step : end]) > self.overlap:
            step = int(step * 0.9)
        return end - step


def _sections(text: str, layout: Layout, budget: Characters) -> list[tuple[int, int]]:
    """The ranges that no chunk reaches across: sections, short ones joined to the next."""
    starts = layout.starts
    ends = [*starts[1:], len(text)]
    short = budget.size * _SECTION_FROM
    ranges = []
    open_at = 0
    for index, end in enumerate(ends):
        last = index + 1 == len(ends)
        if not last:
            if layout.bare[index]:
                continue  # a heading goes with what stands under it
            if end - open_at < short and budget.kept(text, open_at, ends[index + 1]):
                continue
        ranges.append((open_at, end))
        open_at = end
    return ranges


def fill(
    text: str,
    start: int,
    end: int,
    budget: Characters,
    layout: Layout | None,
    chunks: list[Chunk],
) -> list[Chunk]:
    """Appends the chunks of text[start:end]."""
    content = end
    if text[end - 1].isspace():
        content = start + len(text[start:end].rstrip())
    path: tuple[str, ...] = ()
    done = start  # up to here the text is covered; start is before it by the overlap
    while done < end:
        high = budget.reach(text, start, end)
        if high <= done:
            start = done  # no room behind the overlap
            continue
        cut = high
        if high < end:
            cut = _cut(text, start, done, high, layout)
            if cut >= content > done + 1:
                # What is left is blank: leave it some text to stand with.
                cut = _cut(text, start, done, content - 1, layout)
            if text[cut] in sentence.CLOSING or text[cut].isspace():
                cut = _openable(text, start, done, cut, layout)
            # Tokens merge across the end, so that a shorter text may take more of them.
            while cut < high and not budget.kept(text, start, cut):
                high = max(done + 1, cut - 1 - (cut - start) // 10)
                cut = _cut(text, start, done, high, layout)
        if layout is not None:
            path = layout.path(start, cut)
        chunks.append(Chunk(start, cut, text[start:cut], path))
        done = cut
        if budget.overlap and cut < end:
            low = max(budget.back(text, start, cut), start + 1)
            start = sentence.first_sentence_start(text, low, cut) or cut
        else:
            start = cut
    return chunks


def _openable(text: str, start: int, done: int, cut: int, layout: Layout | None) -> int:
    """`cut`, or an earlier one if the next chunk would open with closing punctuation there."""
    sought = cut
    for _ in range(_TRIES):
        after = sentence.after_space(text, sought, min(len(text), sought + _BLANK))
        if sentence.may_open(text, after):
            return sought
        if sought <= done + 1:
            break
        sought = _cut(text, start, done, sought - 1, layout)
    return cut


def _cut(text: str, start: int, done: int, high: int, layout: Layout | None) -> int:
    """The best place in (done, high] to end the chunk that opens at `start`."""
    low = done
    if text[low].isspace():
        # Not a chunk of nothing but the space that did not fit into the one before.
        low = sentence.after_space(text, low, high)
        if low >= high:
            return sentence.last_character_end(text, done, high)
    span = high - start
    if layout is not None and layout.blocks:
        block = layout.block_at(high)
        if block is not None:
            opening, closing = block
            if opening > low and (closing - opening <= span or opening - start > span // 2):
                return opening
            inside = sentence.last_line_end(text, max(low, opening), high)
            if inside:
                return inside
        cut = last_prose_cut(text, start, low, high)
        block = layout.block_at(cut)
        if block is None:
            return cut
        if block[1] <= high:
            return sentence.after_blank(text, block[1], high)
        return block[0] if block[0] > low else cut
    return last_prose_cut(text, start, low, high)
