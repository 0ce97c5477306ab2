"""Answers by a model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from khaosz.cli.models import model_named, models_here
from khaosz.cli.terminal.conversation import (
    Conversation,
    Ended,
    Events,
    Forgotten,
    Part,
    Settings,
    Source,
    Turns,
    told_apart,
)
from khaosz.inference.generator import Generator, Piece
from khaosz.inference.parts import PartStream, opens_thought
from khaosz.inference.sampling import SamplingParams
from khaosz.rag import KnowledgeBase
from khaosz.rag.answer import Answer, ask
from khaosz.rag.models.chat_model import Messages
from khaosz.rag.store import open_store

KB = "khaosz.kb"


class LocalPartner:
    def __init__(self, generator: Generator, name: str, *, device: str = "cpu") -> None:
        self.generator, self.name, self._device = generator, name, device
        self._base: tuple[str, KnowledgeBase] | None = None

    @classmethod
    def from_path(cls, model: Path, *, device: str = "cpu") -> LocalPartner:
        return cls(Generator.from_directory(model, device=device), str(model), device=device)

    @property
    def about(self) -> str:
        return f"context {self.generator.context} tokens"

    def models(self) -> list[str]:
        return [str(path) for path in models_here()]

    def choose(self, name: str) -> None:
        path = model_named(name)
        self.generator = Generator.from_directory(path, device=self._device)
        self.name = str(path)

    def bases(self) -> list[str]:
        return [KB] if Path(KB).exists() else []

    def open_base(self, name: str) -> None:
        self._opened(name)

    def check(self, settings: Settings) -> None:
        _params(settings)

    def close(self) -> None:
        if self._base is not None:
            self._base[1].close()
            self._base = None

    def answer(self, conversation: Conversation, message: str) -> Events:
        if conversation.documents is not None:
            return self._from_documents(conversation, message)
        return self._from_itself(conversation, message)

    def _from_itself(self, conversation: Conversation, message: str) -> Events:
        params = _params(conversation.settings)
        asked = conversation.asking(message)
        room = min(params.max_tokens, self.generator.context // 4)
        turns, ids = self._fitting(conversation, asked, self.generator.context - room)
        model = _Speaker(self.generator, params)
        pieces = model.pieces(ids, params)  # refuses a prompt that is too long
        if len(turns) < len(asked):
            yield Forgotten((len(asked) - len(turns)) // 2)
        yield from pieces
        yield Ended(model.reason)

    def _from_documents(self, conversation: Conversation, message: str) -> Events:
        """Greedy and without a penalty, since it shall quote."""
        settings = conversation.settings
        base = self._opened(str(conversation.documents))
        context = self.generator.context
        # The passages have at least half of the context.
        turns, _ = self._fitting(conversation, conversation.turns, context // 2, fewest=0)
        model = _Speaker(self.generator, _params(settings))
        room = min(settings.max_tokens, context // 4)
        history = conversation.with_system(turns)
        reply = ask(base, message, model, history=history, max_tokens=room, temperature=0.0)
        if len(turns) < len(conversation.turns):
            yield Forgotten((len(conversation.turns) - len(turns)) // 2)
        for text in reply:
            yield from model.take_thoughts()
            yield Part(text)
        yield Ended(model.reason if reply.found else "stop", *_sources(reply))

    def _fitting(
        self, conversation: Conversation, turns: Turns, room: int, fewest: int = 1
    ) -> tuple[Turns, list[int]]:
        """The last turns that have room, and the ids of the prompt that they make."""
        while True:
            messages = conversation.with_system(turns)
            ids = self.generator.chat_ids(messages) if messages else []
            if len(ids) <= room or len(turns) <= fewest:
                return turns, ids
            turns = turns[2:]

    def _opened(self, name: str) -> KnowledgeBase:
        if self._base is None or self._base[0] != name:
            opened = KnowledgeBase(open_store(name, new=False))
            self.close()
            self._base = name, opened
        return self._base[1]


class _Speaker:
    """A model as `khaosz.rag.answer.ask` wants it, that keeps why it ended and what it thought."""

    def __init__(self, generator: Generator, params: SamplingParams) -> None:
        self._generator, self._seed = generator, params.seed
        self.context = generator.context
        self.reason: str | None = None
        self._thoughts: list[Part] = []

    def count(self, messages: Messages) -> int:
        return len(self._generator.chat_ids(messages))

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        params = SamplingParams(max_tokens, temperature, seed=self._seed)
        for part in self.pieces(self._generator.chat_ids(messages), params):
            if part.thought:
                self._thoughts.append(part)
            else:
                yield part.text

    def pieces(self, ids: list[int], params: SamplingParams) -> Iterator[Part]:
        """Raises `GenerationError` at once for a prompt that is too long."""
        pieces = self._generator.stream(ids, params)
        end = self._generator.tokenizer.decode(ids[-8:])  # tokens that hold the mark and a break
        return self._told_apart(pieces, PartStream(thinking=opens_thought(end)))

    def _told_apart(self, pieces: Iterator[Piece], parts: PartStream) -> Iterator[Part]:
        for piece in pieces:
            yield from told_apart(parts.feed(piece.text))
            self.reason = piece.finish_reason
        yield from told_apart(parts.finish())

    def take_thoughts(self) -> list[Part]:
        taken, self._thoughts = self._thoughts, []
        return taken


def _params(settings: Settings) -> SamplingParams:
    return SamplingParams(
        settings.max_tokens,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
    )


def _sources(reply: Answer) -> tuple[tuple[Source, ...], bool]:
    """Those that the answer names, or those it was given; and whether it named them."""
    if reply.citations:
        named = (Source(c.number, c.doc, c.page, c.start, c.end) for c in reply.citations)
        return tuple(named), True
    passages = reply.prompt.passages if reply.prompt else ()
    given = (Source(i, hit.doc, hit.page, hit.start, hit.end) for i, hit in enumerate(passages, 1))
    return tuple(given), not passages
