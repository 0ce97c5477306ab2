"""Where a sentence ends, in Chinese, English and text that mixes both.

A candidate is a run of end marks with the closing quotes and brackets after it, found by one
regular expression; the text around it decides whether it ends a sentence. Every search is limited
to a window, so that splitting a text takes linear time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from re import Match, Pattern

# Marks that end a sentence whatever follows; `.!?` need whitespace or Chinese after them.
_FULL = "。！？；…｡"
_CLOSERS = "”’』」）】》〉〕］｝»›)]}\"'"
# Logs and dumps write a line break as backslash and n; after an end mark it ends a sentence.
_SENTENCE = re.compile(rf"[{_FULL}.!?]+[{re.escape(_CLOSERS)}]*(?:\\n)*")
_CLAUSE = re.compile(rf"[，、：,;:—]+[{re.escape(_CLOSERS)}]*")
_SPACE = re.compile(r"\s+")
_LINE = re.compile(r"\n")
_SENTENCE_OR_LINE = re.compile(rf"{_SENTENCE.pattern}|\n")
_ITEM = re.compile(
    r"[ \t\u3000]*(?:[-*+•·] |\d{1,3}[.)、] ?|[（(]?[一二三四五六七八九十]{1,3}[、）)]"
    r"|第[零〇一二三四五六七八九十百千]{1,7}条)"
)
_LATIN_WORD = re.compile(r"[0-9A-Za-z.]+\Z")
# Blank space that stays with the text before a cut; without the indentation of the next line.
_BLANK = re.compile(r"\s*\n|\s+")

# No chunk opens with one of these if another cut is possible. Straight quotes are not among them:
# they open as well as close. "..." may open a quotation, but a chunk cut inside a run of dots would
# open with a dot.
CLOSING = frozenset("。！？；：，、．｡､”’』」）】》〉〕］｝»›,.;:!?)]}")
_FULL_MARKS = frozenset(_FULL)
_CLOSER_MARKS = frozenset(_CLOSERS)
# After these a line break ends a paragraph; after others it may only wrap a line.
PARAGRAPH_ENDS = frozenset(_FULL + _CLOSERS + ".!?:：\n")
SENTENCE_MARKS = PARAGRAPH_ENDS - frozenset(":：\n")
LINE_ENDS = PARAGRAPH_ENDS | frozenset(",，;、")  # a title ends with none of these
_FIRST_CJK = "\u2e80"
_WRAPPED, _WRAPPED_CJK = 40, 25  # least characters of a line that is taken as hard-wrapped
_WORD_BEFORE = 14  # characters searched for an abbreviation, longer than any of them

_ABBREVIATIONS = frozenset((
    "adm", "al", "approx", "assn", "ave", "bros", "ca", "capt", "cf", "cmdr", "co", "corp", "dept",
    "dr", "ed", "eds", "esp", "est", "fr", "gen", "gov", "hon", "inc", "jr", "lt", "ltd", "messrs",
    "mr", "mrs", "ms", "mt", "pres", "prof", "rep", "resp", "rev", "sen", "sgt", "sr", "st", "ste",
    "univ", "viz", "vs",
))  # fmt: skip
_BEFORE_NUMBERS = frozenset((
    "app", "apr", "art", "aug", "ch", "chap", "col", "dec", "eq", "eqs", "ex", "feb", "fig", "figs",
    "jan", "jul", "jun", "mar", "max", "min", "no", "nos", "nov", "oct", "op", "pl", "pp", "pt",
    "ref", "refs", "sec", "sep", "sept", "suppl", "tab", "vol", "vols",
))  # fmt: skip


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The sentences of `text` as (start, end) in characters; they tile it.

    The ends of paragraphs, list items and short lines end a sentence, too; the line breaks of
    hard-wrapped text do not.
    """
    spans: list[tuple[int, int]] = []
    start = line = after_space(text, 0, len(text))
    opened = 0
    for match in _SENTENCE_OR_LINE.finditer(text):
        if match.start() < start:
            continue
        if match[0] == "\n":
            end, line_before = match.start(), line
            line = match.end()
            wrapped = end - line_before >= (
                _WRAPPED if text[end - 1] < _FIRST_CJK else _WRAPPED_CJK
            )
            if wrapped and not ends_paragraph(text, end):
                continue
        else:
            end = _sentence_end(text, match)
            if not end:
                continue
        end = after_space(text, end, len(text))
        if end > start:
            spans.append((opened, end))
            start = opened = end
            # A short rest of a line after a sentence does not make the line a short one.
            line = max(line, text.rfind("\n", line, end) + 1)
    if opened < len(text):
        spans.append((opened, len(text)))
    return spans


def ends_paragraph(text: str, line: int) -> bool:
    """Whether the line break at `line` ends a paragraph or list item, not a wrapped line."""
    last = line - 1
    if last >= 0 and text[last] in PARAGRAPH_ENDS:
        return True
    while last > line - 4 and text[last : last + 1] in (" ", "\t", "\r"):
        last -= 1
    before = text[last] if last >= 0 else "\n"
    if before in PARAGRAPH_ENDS or text[line + 1 : line + 2] in ("\n", "\r", ""):
        return True
    return is_item(text, line + 1)


def is_item(text: str, start: int) -> bool:
    """Whether the line at `start` is an item of a list or an article of a law."""
    return _ITEM.match(text, start) is not None


def paragraph_end(text: str, line: int, low: int, high: int) -> int:
    """The end, in (low, high], of a chunk cut at the line break `line`, with blank lines; 0 if no
    paragraph ends there or the next one opens with closing punctuation."""
    if text[line - 1] not in SENTENCE_MARKS and not ends_paragraph(text, line):
        return 0
    end = line + 1
    if end < high and text[end].isspace():
        end = after_blank(text, line, high)
    return end if end > low and may_open(text, end) else 0


def last_sentence_end(text: str, low: int, high: int) -> int:
    """The last sentence end in (low, high], with the blank space after it that fits; or 0."""
    return _last(_SENTENCE, _sentence_end, text, low, high)


def last_clause_end(text: str, low: int, high: int) -> int:
    """The last position in (low, high] after a comma, colon, semicolon or dash, or 0."""
    return _last(_CLAUSE, _clause_end, text, low, high)


def last_space_end(text: str, low: int, high: int) -> int:
    """The last position in (low, high] after whitespace at which a chunk may open, or 0."""
    return _last(_SPACE, _opening, text, low, high)


def last_line_end(text: str, low: int, high: int) -> int:
    """The last line start in (low, high] at which a chunk may open, or 0."""
    return _last(_LINE, _opening, text, low, high)


def first_sentence_start(text: str, low: int, high: int) -> int:
    """Where overlap starts: the first sentence in [low, high), else the first word, else 0."""
    for pattern, accept in ((_SENTENCE, _sentence_end), (_SPACE, _opening)):
        # From a little earlier: a sentence that opens at `low` has its mark there.
        for match in pattern.finditer(text, max(0, low - 8), high):
            end = accept(text, match)
            end = after_blank(text, end, high) if end else 0
            if low <= end < high and may_open(text, end):
                return end
    return 0


def last_character_end(text: str, low: int, high: int) -> int:
    """The last position in (low, high] that divides no visible character, else `high`."""
    for end in range(high, low, -1):
        if may_open(text, end) and not _joined(text, end):
            return end
    for end in range(high, low, -1):
        if not _joined(text, end):
            return end
    return high


def after_blank(text: str, end: int, high: int) -> int:
    """`end` moved past the blank space after it, at most to `high`."""
    if end < high and text[end].isspace():
        blank = _BLANK.match(text, end, high)
        after = blank.end() if blank else end
        return after - 1 if text[after - 1] == "\r" and text.startswith("\n", after) else after
    return end


def after_space(text: str, start: int, high: int) -> int:
    """The first position in [start, high] that is not whitespace, else `high`."""
    match = _SPACE.match(text, start, high)
    return match.end() if match else start


def may_open(text: str, at: int) -> bool:
    """Whether a chunk may open at `at`: not with closing punctuation or a combining mark."""
    if at >= len(text):
        return True
    first = text[at]
    if first in CLOSING:
        return first == "!" and text.startswith("![", at)  # a Markdown image
    if first == "\n":
        return text[at - 1 : at] != "\r"
    return first < "\u0300" or unicodedata.category(first)[0] != "M"


def _last(
    pattern: Pattern[str],
    accept: Callable[[str, Match[str]], int],
    text: str,
    low: int,
    high: int,
) -> int:
    # Backwards in windows that double: the end is usually near, and a text without one costs two
    # passes. A match that the end of its window cuts off is refused, since a mark follows it.
    width = 64
    limit = high
    while high > low:
        left = max(low, high - width)
        matches = list(pattern.finditer(text, left, high))
        for match in reversed(matches):
            end = accept(text, match)
            if end > low:
                after = after_blank(text, end, limit)
                if after == end or may_open(text, after):
                    return after
        high = left
        width += width
    return 0


def _sentence_end(text: str, match: Match[str]) -> int:
    """Where the sentence closed by this run of marks ends, or 0 if it continues."""
    end = match.end()
    if end == len(text):
        return end
    following = text[end]
    if match[0][-1] == "n":
        return end if may_open(text, end) and not _list_number(text, match.start()) else 0
    if following in CLOSING or following == "…":
        return 0
    last = text[end - 1]
    if following >= _FIRST_CJK and last in _FULL_MARKS:
        return end if may_open(text, end) else 0
    begin = match.start()
    mark = end
    while text[mark - 1] in _CLOSER_MARKS:
        mark -= 1
    before = text[mark - 1]
    spaced = following.isspace()
    if last in "\"'" and not spaced and before in _FULL_MARKS:
        # Between two Chinese sentences a straight quote opens or closes by the number before it.
        line = text.rfind("\n", max(0, begin - 400), begin) + 1 or max(0, begin - 400)
        if text.count(last, line, end - 1) % 2 == 0:
            return end - 1
        return end
    if spaced:
        after = text[end + 1 : end + 2]
        if after.islower():
            return 0
    elif before not in _FULL_MARKS and following < _FIRST_CJK:
        return 0
    if before == "." and begin == mark - 1 and _abbreviated(text, begin, spaced):
        return 0
    return end if may_open(text, end) else 0


def _abbreviated(text: str, dot: int, spaced: bool) -> bool:
    """Whether the full stop at `dot` belongs to the word, number or list marker before it."""
    previous = text[dot - 1 : dot]
    if previous >= _FIRST_CJK:
        return False
    match = _LATIN_WORD.search(text, max(0, dot - _WORD_BEFORE), dot)
    if match is None:
        return False
    if not spaced and not (match[0].isalpha() and match[0].islower() and len(match[0]) > 3):
        return True  # Chinese follows: "3.节" is a number, "Inc.的" a name
    word = match[0].lower()
    if _list_number(text, dot):
        return True
    if word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha()):
        return True
    if word in _BEFORE_NUMBERS:
        return text[dot + 2 : dot + 3].isdigit()
    return "." in word and all(len(part) <= 1 for part in word.split("."))


def _list_number(text: str, dot: int) -> bool:
    """Whether the full stop at `dot` follows the number of a list item."""
    first = dot
    while first > dot - 4 and text[first - 1 : first].isdigit():
        first -= 1
    return first < dot and (
        first == 0 or text[first - 1] == "\n" or text[first - 2 : first] == "\\n"
    )


def _clause_end(text: str, match: Match[str]) -> int:
    end = match.end()
    after = text[end : end + 1]
    if text[end - 1] < _FIRST_CJK and after < _FIRST_CJK and after.isalnum():
        return 0  # 10,000 or a:b
    return _opening(text, match)


def _opening(text: str, match: Match[str]) -> int:
    return match.end() if may_open(text, match.end()) else 0


def _joined(text: str, at: int) -> bool:
    """Whether a cut at `at` would divide a character: surrogates, emoji sequences."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if after < "\u0300":
        return False
    if after in "\u200d…" or before == "\u200d":
        return after != "…" or before == "…"
    if "\U0001f3fb" <= after <= "\U0001f3ff" or unicodedata.category(after)[0] == "M":
        return True
    if "\udc00" <= after <= "\udfff":
        return "\ud800" <= before <= "\udbff"
    if "\U0001f1e6" <= after <= "\U0001f1ff":  # flags are pairs of regional indicators
        pairs = 0
        while pairs < 64 and pairs < at and "\U0001f1e6" <= text[at - 1 - pairs] <= "\U0001f1ff":
            pairs += 1
        return pairs % 2 == 1
    return False
