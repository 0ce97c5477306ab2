"""Encoding large amounts of text: same ids as `Tokenizer.encode`, less work and bounded memory.

Two facts about the Qwen2 pattern are used, and only for tokenizers that have it (`can_cut`):

1. After a letter and before a punctuation mark or a white space a piece always ends. Every
   alternative that takes letters takes the whole run of them, and no lookahead reaches over. Merges
   stay inside pieces, so text may be cut there without changing an id.
2. English repeats its words. In a stretch of ASCII, Python's `re` finds the pieces and a dictionary
   knows their ids; the library is only asked about new ones. That is about four times as fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain

from khaosz.data.tokenizer import QWEN2_PATTERN, Tokenizer

_SAFE_CUT = re.compile(r"[A-Za-z\u4e00-\u9fa5](?=[ \n\t,.;:!?，。；：！？、])")
# Greedy on both sides: from the first safe place of an ASCII stretch to its last one.
_ASCII_STRETCH = re.compile(
    r"(?<=[A-Za-z])(?=[ \n\t,.;:!?])[\x00-\x7f]{64,}(?<=[A-Za-z])(?=[ \n\t,.;:!?])"
)
_LEADING_ASCII = re.compile(r"[\x00-\x7f]{64,}(?<=[A-Za-z])(?=[ \n\t,.;:!?])")
# QWEN2_PATTERN where every character is ASCII.
_ASCII_PIECE = re.compile(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)
_CACHED_CHARACTERS = 1 << 19  # about 100 thousand words, 20 MB


@lru_cache(maxsize=2)
def can_cut(serialized: bytes) -> bool:
    """Whether this tokenizer.json cuts text by the Qwen2 pattern and does nothing else to it."""
    spec = json.loads(serialized)
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers") or []
    return (
        spec.get("normalizer") is None
        and all(token["special"] for token in spec.get("added_tokens") or [])
        and len(steps) == 2
        and steps[0].get("type") == "Split"
        and steps[0].get("pattern") == {"Regex": QWEN2_PATTERN}
        and steps[0].get("behavior") == "Isolated"
        and not steps[0].get("invert")
        and steps[1].get("type") == "ByteLevel"
        and steps[1].get("add_prefix_space") is False
        and steps[1].get("use_regex") is False
    )


def cut_text(text: str, limit: int) -> Iterator[str]:
    """Pieces of about `limit` characters whose ids, joined, are those of the whole text.

    Only for tokenizers that `can_cut` accepts. A stretch without a safe place stays whole.
    """
    start = 0
    while len(text) - start > limit:
        match = _SAFE_CUT.search(text, start + limit - 1)
        if match is None:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _stretches(text: str) -> Iterator[tuple[int, int, bool]]:
    """The text as consecutive (start, end, whether to use the dictionary)."""
    if text.isascii():
        yield 0, len(text), True
        return
    position = 0
    leading = _LEADING_ASCII.match(text)
    if leading is not None:
        position = leading.end()
        yield 0, position, True
    for match in _ASCII_STRETCH.finditer(text, position):
        if match.start() > position:
            yield position, match.start(), False
        yield match.start(), match.end(), True
        position = match.end()
    if position < len(text):
        yield position, len(text), False


class PieceEncoder:
    """`encode_batch` of a tokenizer, faster for English, remembering the pieces it has met."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.can_cut = can_cut(tokenizer.serialized)
        self._ids: dict[str, list[int]] = {}
        self._characters = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[tokenizer.encode(text) for text in texts]`, for texts that UTF-8 can hold."""
        if not self.can_cut:
            return self.tokenizer.encode_batch(texts)
        if self._characters > _CACHED_CHARACTERS:
            self._ids.clear()
            self._characters = 0
        known = self._ids
        plans: list[list[list[str] | None]] = []
        asked: list[str] = []  # stretches for the library, in order
        missing: set[str] = set()
        for text in texts:
            plan: list[list[str] | None] = []
            for start, end, ascii_only in _stretches(text):
                if ascii_only:
                    pieces = _ASCII_PIECE.findall(text, start, end)
                    missing.update(set(pieces).difference(known))
                    plan.append(pieces)
                else:
                    asked.append(text[start:end])
                    plan.append(None)
            plans.append(plan)
        new = sorted(missing)
        answers = self.tokenizer.encode_batch(asked + new)
        known.update(zip(new, answers[len(asked) :], strict=True))
        self._characters += sum(map(len, new))
        answer = iter(answers)
        return [
            list(
                chain.from_iterable(
                    next(answer) if part is None else chain.from_iterable(map(known.get, part))  # type: ignore[arg-type]
                    for part in plan
                )
            )
            for plan in plans
        ]
