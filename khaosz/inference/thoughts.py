"""A limit on the tokens of a model's thoughts: when they reach it, they are closed with the text
that the chat template writes between thoughts and answer, and the answer follows."""

from __future__ import annotations

from collections.abc import Sequence

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_control
from khaosz.data.tokenizer.thinking import THINK, THOUGHT, opens_thought, thinking_of

_OPEN, _CLOSE = THINK.encode(), THOUGHT.encode()
_TAIL = 2 * len(_CLOSE)  # bytes: more than a marker and what a token adds to it, mostly


class ThoughtLimit:
    """Of one choice. Thoughts that the prompt has opened, or the answer begins with, count."""

    def __init__(self, tokenizer: Tokenizer, budget: int, prompt: Sequence[int]) -> None:
        self._tokenizer, self._budget = tokenizer, budget
        self._used = 0
        self._tail = b""
        self._state = "begin"
        if opens_thought(tokenizer.decode(prompt[-8:])):
            self._state = "thought"
        self._closing: list[int] = []
        self._limit()

    def forced(self) -> int | None:
        """The token that must come next."""
        return self._closing[0] if self._closing else None

    def add(self, token: int) -> None:
        """A token was chosen."""
        if self._closing:
            self._closing.pop(0)
            return
        if self._state == "answer":
            return
        raw = self._tokenizer.token_bytes(token)
        self._tail += raw
        if self._state == "begin":
            start = self._tail.lstrip()
            if start.startswith(_OPEN):
                self._state, self._tail = "thought", start.removeprefix(_OPEN)
            elif not _OPEN.startswith(start):
                self._state = "answer"
        else:
            self._used += 1
            if _CLOSE in self._tail:
                self._state = "answer"
            self._tail = self._tail[-max(_TAIL, len(raw)) :]
        self._limit()

    def _limit(self) -> None:
        if self._state == "thought" and self._used >= self._budget:
            tokenizer = self._tokenizer
            known = thinking_of(tokenizer.chat_template_for(None), tokenizer.template_variables)
            self._closing = encode_control(tokenizer, known.close)
            self._state = "answer"
