"""A conversation, and the protocol of the backends that answer it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from khaosz.errors import DataError
from khaosz.files import write_json
from khaosz.inference.parts import Part, ToolCall
from khaosz.interop.sampling import sampling_values

if TYPE_CHECKING:
    from khaosz.rag.answer import Answer

NO_CITATION = "The answer cites no source. Passages in the prompt:"

NOT_ASKED = "The passages found seem to be about something else: the model was not asked."
NO_SENTENCE = "No sentence of the passages found answers the question."
NOTHING_FOUND = "No passage has a word of the question; an embedder also finds by meaning."

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class Settings:
    """How answers are sampled. None: as the model wants it; `think`: as its template does by
    default. The backend checks the ranges."""

    max_tokens: int = 1024
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    thinking_budget: int | None = None
    think: bool | None = None

    def asked(self) -> dict[str, Any]:
        """The sampling parameters that are set, `max_tokens` among them."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        values.pop("think", None)
        return values

    def in_force(self, defaults: Mapping[str, float]) -> dict[str, Any]:
        """With those of the model; seed and budget only where they are set."""
        return sampling_values(defaults, self.asked())


@dataclass
class Conversation:
    settings: Settings
    system: str | None = None
    turns: Turns = field(default_factory=list)
    documents: str | None = None  # knowledge base to answer from
    anyway: bool = False  # ask the model although no passage seems relevant
    thoughts: str = ""  # of the last answer: they are not sent to the model again
    warned: set[str] = field(default_factory=set)  # languages that the model lacks

    @property
    def messages(self) -> Turns:
        return self.with_system(self.turns)

    def with_system(self, turns: Turns) -> Turns:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + turns

    def with_message(self, message: str) -> Turns:
        return [*self.turns, {"role": "user", "content": message}]


@dataclass(frozen=True)
class Source:
    """A passage: its number in the prompt, and where to find it."""

    number: int
    place: str

    def __str__(self) -> str:
        return f"[{self.number}] {self.place}"


def sources_of(reply: Answer) -> tuple[tuple[Source, ...], bool]:
    """Sources that an answer cites, else the passages of its prompt, or those that were found if
    the model was not asked; and whether it cites any."""
    passages = enumerate(reply.passages or reply.hits, start=1)
    given = {number: Source(number, hit.place) for number, hit in passages}
    cited = tuple(given[citation.number] for citation in reply.citations)
    return cited or tuple(given.values()), bool(cited) or not given


@dataclass(frozen=True)
class Truncated:
    """The context is full: this many of the oldest exchanges are dropped."""

    exchanges: int


@dataclass(frozen=True)
class Warned:
    """The model is known to lack the `language` of the message."""

    language: str
    message: str


@dataclass(frozen=True)
class Thought:
    """The thoughts are complete; their tokens, where they can be counted."""

    tokens: int | None


def text_parts(parts: Iterable[Part | ToolCall]) -> Iterator[Part]:
    """Answer and reasoning of a parsed stream; tool calls are never requested here."""
    return (part for part in parts if isinstance(part, Part))


@dataclass(frozen=True)
class Finished:
    """`reason`: "stop", "length" or a server's own word. `sources`: those that the answer cites,
    or, if not `cited`, the passages in the prompt, or those found if the model was not `asked`."""

    reason: str | None
    sources: tuple[Source, ...] = ()
    cited: bool = True
    asked: bool = True


Event = Truncated | Warned | Part | Thought | Finished
Events = Generator[Event, None, None]


def with_thought(events: Events, count: Callable[[str], int | None]) -> Events:
    """The events, and `Thought` behind the last part of the reasoning."""
    text = ""
    for event in events:
        if isinstance(event, Part) and event.kind == "reasoning":
            text += event.text
        elif text:
            yield Thought(count(text))
            text = ""
        yield event


class ChatBackend(Protocol):
    """Answers a conversation. All methods raise `KhaoszError`."""

    @property
    def name(self) -> str:
        """Name of the current model."""

    @property
    def about(self) -> str:
        """Its address and context length, for people."""

    @property
    def sampling(self) -> Mapping[str, float]:
        """How the current model wants to be sampled; empty where that is not known."""

    @property
    def thinking(self) -> str | None:
        """Whether its answers begin with thoughts, as /v1/models has it; None: not known."""

    def resize(self, context: int) -> None:
        """Change the context. Raises `KhaoszError` where that cannot be done."""

    def models(self) -> list[str]:
        """Names that `choose` accepts."""

    def choose(self, name: str) -> None:
        """Switch to another model; on failure the current one stays."""

    def knowledge_bases(self) -> list[str]:
        """Names of the available knowledge bases."""

    def open_knowledge_base(self, name: str) -> None:
        """Raises `DataError` or `ServerError` if it cannot be used."""

    def check(self, settings: Settings) -> None:
        """Raises `GenerationError` for a value out of range, if this backend can tell."""

    def answer(self, conversation: Conversation, message: str) -> Events:
        """Parts, and `Finished` at the end. Closing the generator stops the answer."""

    def close(self) -> None: ...


def save(conversation: Conversation, path: Path) -> None:
    """Write JSON. Raises `OSError`."""
    write_json(path.resolve(), {"messages": conversation.messages})


def load(path: Path) -> tuple[str | None, Turns]:
    """System message and turns of a file written by `save`. Raises `DataError`, `OSError`."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        turns = [{"role": each["role"], "content": each["content"]} for each in messages]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{path} is not a conversation", hint="/save FILE writes one") from None
    if not all(isinstance(value, str) for turn in turns for value in turn.values()):
        raise DataError(f"{path}: a message is not text")
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else None
    for i, turn in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if turn["role"] != expected:
            raise DataError(f"{path}: message {i + 1} has role {turn['role']}, not {expected}")
    if len(turns) % 2:
        raise DataError(f"{path} ends with an unanswered message")
    return system, turns
