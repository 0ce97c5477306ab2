"""Ids in, text out: whole characters, and never any part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from khaosz.data.tokenizer.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Holds back what may be the start of a stop string; O(longest stop) per token.

    The text continues `after`, a prompt. A SentencePiece tokenizer writes a space before the first
    word: it belongs to a text that continues, and not to one that follows a control token.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, after: Sequence[int] | None = None
    ) -> None:
        begins = after is not None and (not after or tokenizer.is_special(after[-1]))
        self._decoder = StreamDecoder(tokenizer, continues=not begins)
        self._stops = stops
        self._pending = ""
        self.stop: str | None = None  # the stop string that was met

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is final, and whether a stop string was met."""
        return self._release(self._decoder.push(token), last=False)

    def finish(self) -> tuple[str, bool]:
        """The rest, with U+FFFD for an incomplete character."""
        return self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> tuple[str, bool]:
        self._pending += text
        at = first_stop(self._pending, self._stops)
        if at is not None:
            self.stop = next(stop for stop in self._stops if self._pending.startswith(stop, at))
            ready, self._pending = self._pending[:at], ""
            return ready, True
        keep = 0 if last else possible_stop(self._pending, self._stops)
        at = len(self._pending) - keep
        ready, self._pending = self._pending[:at], self._pending[at:]
        return ready, False


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, or None."""
    starts = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(starts, default=None)


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is the start of a stop string."""
    for length in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
