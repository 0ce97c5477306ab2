"""A conversation, and what whoever answers it must be able to do."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from khaosz.errors import DataError
from khaosz.inference import parts as serve

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Settings:
    """How answers are sampled. Whoever answers says what is out of range."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass
class Conversation:
    settings: Settings
    system: str | None = None
    turns: Turns = field(default_factory=list)
    documents: str | None = None  # the knowledge base that answers come from

    @property
    def messages(self) -> Turns:
        return self.with_system(self.turns)

    def with_system(self, turns: Turns) -> Turns:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + turns

    def asking(self, message: str) -> Turns:
        return [*self.turns, {"role": "user", "content": message}]


@dataclass(frozen=True)
class Source:
    """A passage of a document: characters start to end of its text."""

    number: int
    doc: str
    page: int | None
    start: int
    end: int


@dataclass(frozen=True)
class Forgotten:
    """The context is full: this many of the oldest exchanges are left out from here on."""

    exchanges: int


@dataclass(frozen=True)
class Part:
    """Text as it comes, said or only thought."""

    text: str
    thought: bool = False


def told_apart(parts: Iterable[serve.Part | serve.ToolCall]) -> Iterator[Part]:
    """As a server tells thoughts from the answer; calls of tools are not asked for here."""
    for part in parts:
        if isinstance(part, serve.Part):
            yield Part(part.text, thought=part.kind == "reasoning")


@dataclass(frozen=True)
class Ended:
    """Why: "stop", "length" or what a server calls it. `sources`: those the answer names, or, if
    not `cited`, the passages that it was given."""

    reason: str | None
    sources: tuple[Source, ...] = ()
    cited: bool = True


Events = Generator[Forgotten | Part | Ended, None, None]


class Partner(Protocol):
    """Whoever answers. What it cannot do it says by a `KhaoszError`."""

    @property
    def name(self) -> str:
        """Of the model that answers now."""

    @property
    def about(self) -> str:
        """Where it is and how long its context, in a few words."""

    def models(self) -> list[str]:
        """Names that `choose` takes."""

    def choose(self, name: str) -> None:
        """Answer by another model from here on; one that fails changes nothing."""

    def bases(self) -> list[str]:
        """Knowledge bases that are known to be there."""

    def open_base(self, name: str) -> None:
        """Raises `DataError` or `ServerError` if answers cannot come from it."""

    def check(self, settings: Settings) -> None:
        """Raises `GenerationError` for a value out of range, if that can be known before asking."""

    def answer(self, conversation: Conversation, message: str) -> Events:
        """Parts, and `Ended` at the end; closed early, it stops the answer."""

    def close(self) -> None: ...


def save(conversation: Conversation, path: Path) -> None:
    """As JSON. Raises `OSError`."""
    text = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> tuple[str | None, Turns]:
    """System message and turns of a file that `save` wrote. Raises `DataError`, `OSError`."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        turns = [{"role": each["role"], "content": each["content"]} for each in messages]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path} holds no conversation", hint="/save FILE writes one") from None
    if not all(isinstance(value, str) for turn in turns for value in turn.values()):
        raise DataError(f"{path} holds messages that are not text")
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    for at, turn in enumerate(turns):
        expected = "assistant" if at % 2 else "user"
        if turn["role"] != expected:
            raise DataError(
                f"{path}: message {at + 1} is the {turn['role']}'s, not the {expected}'s"
            )
    if len(turns) % 2:
        raise DataError(f"{path} ends with a question that has no answer")
    return system, turns
