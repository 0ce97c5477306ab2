"""Text to train a tokenizer on: a budget of bytes, in pieces that the trainer can process."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from khaosz.errors import TokenizerError

# 256 letters, marks or blanks in a row; Python's classes are close enough to Qwen2's.
_LONG_RUN = re.compile(r"[^\W\d_]{256}|(?:[^\w\s]|_){256}|\s{256}")
_TRAINING_CUT = 1 << 20  # characters: longer documents are trained on in pieces


def training_sample(
    texts: Iterable[str], max_bytes: int, after_reading: Callable[[], None] | None = None
) -> Iterator[str]:
    """At most `max_bytes` of text; long documents are split, for training only. `after_reading` is
    called when the last of it was taken: what it raises ends the training."""
    yield from _limited(texts, max_bytes)
    if after_reading is not None:
        after_reading()


def _limited(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        refuse_surrogates(text)
        for piece in _training_pieces(text):
            size = len(piece.encode())
            if size > left:
                piece = piece.encode()[:left].decode("utf-8", errors="ignore")
            if piece:
                yield piece
            left -= size
            if left <= 0:
                return


def _training_pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most 1 MB, split at line ends and within runs of 256 characters.

    The trainer's time grows with the square of the longest unbroken run: a page of base64 or of
    unpunctuated hanzi takes minutes, a megabyte of it days.
    """
    start = 0
    while start < len(text):
        end = min(len(text), start + _TRAINING_CUT)
        if end < len(text):
            newline = text.rfind("\n", start, end)
            end = newline + 1 if newline >= 0 else end
        for run in _LONG_RUN.finditer(text, start, end):
            yield text[start : run.end()]
            start = run.end()
        yield text[start:end]
        start = end


def refuse_surrogates(text: str) -> None:
    """Raise TokenizerError for text that UTF-8 cannot encode."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: not text",
            hint="it comes from a broken JSON escape or errors='surrogateescape'; remove it",
        ) from error
