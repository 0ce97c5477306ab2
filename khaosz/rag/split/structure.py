"""Splits a text into readable chunks: by headings, then paragraphs, then sentences.

A chunk is filled greedily and cut at the best place in its window: before a code block or table
that does not fit, at a paragraph, a sentence, a line, a clause, a word, a character. Only the
window is searched, so the time is linear in the length of the text, whatever it contains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from khaosz.errors import ConfigError
from khaosz.rag.split import sentence
from khaosz.rag.split.cut import last_prose_cut
from khaosz.rag.split.layout import Layout, find_layout

# A section shorter than this share of the budget is joined to the next one.
_SECTION_FROM = 0.3
_TRIES = 20  # earlier ends of a chunk that are tried
_MAX_BLANK = 1000  # characters of blank space that are skipped to find where the next chunk opens


class Chunk(NamedTuple):
    """`text` is characters [start:end] of the text that was split; `headings` are those above all
    of it, outermost first. A NamedTuple: creating a frozen dataclass takes three times as long,
    which is as long as finding the chunk."""

    start: int
    end: int
    text: str
    headings: tuple[str, ...]


class StructureSplitter:
    """Chunks of at most `max_chars` characters, or `max_tokens` tokens by `count_tokens`.

    `overlap`, in the same unit, is how much of a chunk the next one may repeat; it starts at a
    sentence. Without overlap the chunks tile the text. Raises ConfigError for a budget that cannot
    be met.
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
                "a splitter has one budget, max_chars or max_tokens",
                hint="omit one of them",
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
                hint="pass a function that counts the tokens of a text",
            )
        else:
            budget = max_tokens
        if budget < 1:
            raise ConfigError(f"a chunk size of {budget}", hint="use 1 or more; 800 is usual")
        if not 0 <= overlap <= budget // 2:
            raise ConfigError(
                f"overlap {overlap} with chunks of {budget}", hint="use 0 to half of the chunk size"
            )
        self._size = budget
        self._overlap = overlap
        self._count = count_tokens

    def split(self, text: str) -> list[Chunk]:
        """The chunks in order; none for an empty text. Positions are in characters."""
        if not text:
            return []
        layout = find_layout(text)
        if self._count is not None:
            budget: CharacterBudget = TokenBudget(self._size, self._overlap, self._count)
        elif layout is None and len(text) <= self._size:
            return [Chunk(0, len(text), text, ())]  # most documents, in some collections
        else:
            budget = CharacterBudget(self._size, self._overlap)
        if layout is None:
            return fill(text, 0, len(text), budget, None, [])
        chunks: list[Chunk] = []
        for start, end in _sections(text, layout, budget):
            fill(text, start, end, budget, layout, chunks)
        return chunks


class CharacterBudget:
    """A chunk size and overlap in characters."""

    def __init__(self, size: int, overlap: int) -> None:
        self.size = size
        self.overlap = overlap

    def reach(self, text: str, start: int, end: int) -> int:
        """The furthest end, at most `end`, of a chunk that starts at `start`."""
        return min(start + self.size, end)

    def fits(self, text: str, start: int, end: int) -> bool:
        return end - start <= self.size

    def overlap_start(self, text: str, start: int, end: int) -> int:
        """The earliest start of an overlap with the chunk text[start:end]."""
        return end - self.overlap


class TokenBudget(CharacterBudget):
    """A chunk size and overlap in tokens. The ratio of characters to tokens is kept from chunk to
    chunk, so that two or three counts per chunk are enough."""

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
                # Close enough to save another count.
                if tokens >= 0.95 * self.size:
                    break
                guess = start + int((guess - start) * min(2.0, self.size / max(tokens, 1)) * 0.99)
            else:
                fails = guess
                if fails == start + 1:
                    raise ConfigError(
                        f"{text[start:fails]!r} alone takes {tokens} tokens; the budget is"
                        f" {self.size}",
                        hint="raise max_tokens",
                    )
                guess = start + int((guess - start) * min(0.97, self.size / tokens))
        self.ratio = 0.5 * self.ratio + 0.5 * (fits - start) / self.size
        return fits

    def fits(self, text: str, start: int, end: int) -> bool:
        # A token has few characters, so a text that is far too long need not be counted.
        if end - start > 40 * self.size:
            return False
        return self.count(text[start:end]) <= self.size

    def overlap_start(self, text: str, start: int, end: int) -> int:
        step = int(self.overlap * self.ratio)
        while step > 0 and self.count(text[end - step : end]) > self.overlap:
            step = int(step * 0.9)
        return end - step


def _sections(text: str, layout: Layout, budget: CharacterBudget) -> list[tuple[int, int]]:
    """Ranges that no chunk crosses: sections, with short ones joined to the next."""
    starts = layout.starts
    ends = [*starts[1:], len(text)]
    short = budget.size * _SECTION_FROM
    ranges = []
    start = 0
    for index, end in enumerate(ends):
        last = index + 1 == len(ends)
        if not last:
            if layout.bare[index]:
                continue  # a heading goes with the text under it
            if end - start < short and budget.fits(text, start, ends[index + 1]):
                continue
        ranges.append((start, end))
        start = end
    return ranges


def fill(
    text: str,
    start: int,
    end: int,
    budget: CharacterBudget,
    layout: Layout | None,
    chunks: list[Chunk],
) -> list[Chunk]:
    """Appends the chunks of text[start:end]."""
    content = end
    if text[end - 1].isspace():
        content = start + len(text[start:end].rstrip())
    path: tuple[str, ...] = ()
    done = start  # the text is covered up to here; start is earlier by the overlap
    while done < end:
        high = budget.reach(text, start, end)
        if high <= done:
            start = done  # the overlap fills the budget
            continue
        cut = high
        if high < end:
            cut = _cut(text, start, done, high, layout)
            if cut >= content > done + 1:
                # The rest is blank: leave some text for the next chunk.
                cut = _cut(text, start, done, content - 1, layout)
            if text[cut] in sentence.CLOSING or text[cut].isspace():
                cut = _cut_before_opening(text, start, done, cut, layout)
            # Tokens merge across the cut, so a shorter text may have more of them.
            while cut < high and not budget.fits(text, start, cut):
                high = max(done + 1, cut - 1 - (cut - start) // 10)
                cut = _cut(text, start, done, high, layout)
        if layout is not None:
            path = layout.path(start, cut)
        chunks.append(Chunk(start, cut, text[start:cut], path))
        done = cut
        if budget.overlap and cut < end:
            low = max(budget.overlap_start(text, start, cut), start + 1)
            start = sentence.first_sentence_start(text, low, cut) or cut
        else:
            start = cut
    return chunks


def _cut_before_opening(text: str, start: int, done: int, cut: int, layout: Layout | None) -> int:
    """`cut`, or an earlier one if the next chunk would open with closing punctuation."""
    position = cut
    for _ in range(_TRIES):
        after = sentence.after_space(text, position, min(len(text), position + _MAX_BLANK))
        if sentence.may_open(text, after):
            return position
        if position <= done + 1:
            break
        position = _cut(text, start, done, position - 1, layout)
    return cut


def _cut(text: str, start: int, done: int, high: int, layout: Layout | None) -> int:
    """The best place in (done, high] to end the chunk that opens at `start`."""
    low = done
    if text[low].isspace():
        # Avoids a chunk of only the space that did not fit into the one before.
        low = sentence.after_space(text, low, high)
        if low >= high:
            return sentence.last_character_end(text, done, high)
    span = high - start
    if layout is not None and layout.blocks:
        block = layout.block_at(high)
        if block is not None:
            block_start, block_end = block
            fits_later = block_end - block_start <= span
            if block_start > low and (fits_later or block_start - start > span // 2):
                return block_start
            inside = sentence.last_line_end(text, max(low, block_start), high)
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
