"""What a reasoning model thinks, told apart from what it says."""

from __future__ import annotations

from collections.abc import Iterator

OPENS, CLOSES = "<think>", "</think>"


class ThoughtStream:
    """Takes pieces of an answer and hands out `(text, thought)`: a part between <think> and
    </think> at its beginning is a thought. Only what may still become a mark is held back.

    `open`: the prompt ended with <think>, as some templates do.
    """

    def __init__(self, open: bool = False) -> None:
        self._inside: bool | None = True if open else None  # None: not known yet
        self._trimming = open  # spaces at the start of a thought, and behind it
        self._held = ""

    def feed(self, piece: str) -> Iterator[tuple[str, bool]]:
        self._held += piece
        if self._inside is None:
            begun = self._held.lstrip()
            if OPENS.startswith(begun):  # also when there is nothing but spaces
                return
            self._inside = begun.startswith(OPENS)
            if self._inside:
                self._held, self._trimming = begun.removeprefix(OPENS), True
        if self._inside:
            thought, closed, rest = self._held.partition(CLOSES)
            if not closed:
                cut = len(self._held) - _begun(CLOSES, self._held)
                thought, rest = self._held[:cut], self._held[cut:]
            self._held = rest
            yield from self._part(thought.rstrip() if closed else thought, True)
            if not closed:
                return
            self._inside, self._trimming = False, True
        text, self._held = self._held, ""
        yield from self._part(text, False)

    def finish(self) -> Iterator[tuple[str, bool]]:
        rest, self._held = self._held, ""
        yield from self._part(rest, bool(self._inside))

    def _part(self, text: str, thought: bool) -> Iterator[tuple[str, bool]]:
        if self._trimming:
            text = text.lstrip()
        if text:
            self._trimming = False
            yield text, thought


def _begun(mark: str, text: str) -> int:
    """Characters at the end of `text` that may be the beginning of `mark`."""
    return next(n for n in range(len(mark) - 1, -1, -1) if text.endswith(mark[:n]))
