"""Ids in, text out: whole characters, and never any part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from khaosz.data.tokenizer.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Holds back what may still turn out to begin a stop string; O(longest stop) per token."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = stops
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Text that is final, and whether a stop string was met."""
        return self._release(self._decoder.push(token), last=False)

    def finish(self) -> tuple[str, bool]:
        """The rest, with U+FFFD for a character that never was completed."""
        return self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> tuple[str, bool]:
        self._held += text
        stop = first_stop(self._held, self._stops)
        if stop is not None:
            ready, self._held = self._held[:stop], ""
            return ready, True
        keep = 0 if last else possible_stop(self._held, self._stops)
        at = len(self._held) - keep
        ready, self._held = self._held[:at], self._held[at:]
        return ready, False


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins, or None."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found, default=None)


def possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of some stop string."""
    for length in range(min(len(text), max(map(len, stops), default=0)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
