"""Chat with a model in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from khaosz.cli.terminal.conversation import (
    Conversation,
    Events,
    Finished,
    Settings,
    Truncated,
    Turns,
    Warned,
    sources_of,
    text_parts,
    with_thought,
)
from khaosz.data.tokenizer.thinking import opens_thought
from khaosz.errors import ConfigError
from khaosz.inference.generator import Generator, Piece
from khaosz.inference.parts import Part, PartStream
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.languages import known_languages, language_warning
from khaosz.interop.local_models import find_model, local_models
from khaosz.interop.models import default_name
from khaosz.rag import KnowledgeBase
from khaosz.rag.answer import ask
from khaosz.rag.models.chat_models import LocalModel
from khaosz.rag.models.protocols import Messages
from khaosz.rag.store import open_store

DEFAULT_BASE = "khaosz.kb"


class LocalBackend:
    def __init__(
        self,
        generator: Generator,
        name: str,
        *,
        device: str = "cpu",
        deterministic: bool = False,
        memory_check: bool = True,
    ) -> None:
        self.generator, self.name = generator, name
        self._languages = known_languages(Path(name))
        self._device, self._deterministic = device, deterministic
        self._memory_check = memory_check
        self._base: tuple[str, KnowledgeBase] | None = None

    @classmethod
    def from_path(
        cls,
        model: Path,
        *,
        device: str = "cpu",
        deterministic: bool = False,
        context: int | None = None,
        memory_check: bool = True,
    ) -> LocalBackend:
        settings: dict[str, Any] = {
            "device": device,
            "deterministic": deterministic,
            "memory_check": memory_check,
        }
        generator = Generator.from_directory(model, context=context, **settings)
        return cls(generator, str(model), **settings)

    def check_room(self, conversation: Conversation) -> None:
        """Raises `ConfigError` for a context that the template and the system prompt fill."""
        empty = len(
            self.generator.chat_ids(conversation.with_system(conversation.with_message("")))
        )
        if empty >= self.generator.context:
            system = " and the system prompt" if conversation.system else ""
            raise ConfigError(
                f"a context of {self.generator.context} tokens has no room for a message:"
                f" the chat template{system} take{'' if system else 's'} {empty}",
                hint="start with a longer --context"
                + (", or a shorter --system" if system else ""),
            )

    @property
    def about(self) -> str:
        return f"context {self.generator.context} tokens"

    @property
    def sampling(self) -> Mapping[str, float]:
        return self.generator.sampling

    @property
    def thinking(self) -> str:
        return self.generator.thinking.kind

    def models(self) -> list[str]:
        return [str(path) for path in local_models()]

    def choose(self, name: str) -> None:
        self._open(find_model(name), None)

    def resize(self, context: int) -> None:
        self._open(Path(self.name), context)

    def _open(self, path: Path, context: int | None) -> None:
        self.generator = Generator.from_directory(
            path,
            device=self._device,
            deterministic=self._deterministic,
            context=context,
            memory_check=self._memory_check,
        )
        self.name, self._languages = str(path), known_languages(path)

    def knowledge_bases(self) -> list[str]:
        return [DEFAULT_BASE] if Path(DEFAULT_BASE).exists() else []

    def open_knowledge_base(self, name: str) -> None:
        self._knowledge_base(name)

    def check(self, settings: Settings) -> None:
        sampling(settings, self.sampling)

    def close(self) -> None:
        if self._base is not None:
            self._base[1].close()
            self._base = None

    def answer(self, conversation: Conversation, message: str) -> Events:
        answered = self._from_itself if conversation.documents is None else self._from_documents
        tokenizer = self.generator.tokenizer

        def count(text: str) -> int:
            return len(tokenizer.encode(text))

        warning = language_warning(message, self._languages, default_name(Path(self.name)))
        if warning is not None and warning.language not in conversation.warned:
            yield Warned(warning.language, warning.message)
        yield from with_thought(answered(conversation, message), count)

    def _from_itself(self, conversation: Conversation, message: str) -> Events:
        params = sampling(conversation.settings, self.sampling)
        turns = conversation.with_message(message)
        answer_tokens = min(params.max_tokens, self.generator.context // 4)
        kept, ids = self._truncate(conversation, turns, self.generator.context - answer_tokens)
        model = _ChatModel(self.generator, conversation.settings)
        parts = model.parts(ids, params)  # refuses a prompt that is too long
        if len(kept) < len(turns):
            yield Truncated((len(turns) - len(kept)) // 2)
        yield from parts
        yield Finished(model.reason)

    def _from_documents(self, conversation: Conversation, message: str) -> Events:
        """Greedy and without a penalty, so that the answer quotes."""
        settings = conversation.settings
        base = self._knowledge_base(str(conversation.documents))
        context = self.generator.context
        # At least half of the context is for the passages.
        turns, _ = self._truncate(conversation, conversation.turns, context // 2, fewest=0)
        model = _ChatModel(self.generator, settings)
        limit = min(settings.max_tokens, context // 4)
        history = conversation.with_system(turns)
        reply = ask(
            base, message, model, history=history, max_tokens=limit, temperature=0.0,
            anyway=conversation.anyway,
        )  # fmt: skip
        if len(turns) < len(conversation.turns):
            yield Truncated((len(conversation.turns) - len(turns)) // 2)
        for text in reply:
            yield from model.take_reasoning()
            yield Part("content", text)
        asked = reply.asked
        yield Finished(model.reason if asked else "stop", *sources_of(reply), asked)

    def _truncate(
        self, conversation: Conversation, turns: Turns, max_tokens: int, fewest: int = 1
    ) -> tuple[Turns, list[int]]:
        """The last turns that fit into `max_tokens`, and the ids of their prompt."""
        while True:
            messages = conversation.with_system(turns)
            kwargs = _template_kwargs(self.generator, conversation.settings)
            ids = self.generator.chat_ids(messages, template_kwargs=kwargs) if messages else []
            if len(ids) <= max_tokens or len(turns) <= fewest:
                return turns, ids
            turns = turns[2:]

    def _knowledge_base(self, name: str) -> KnowledgeBase:
        if self._base is None or self._base[0] != name:
            knowledge_base = KnowledgeBase(open_store(name, new=False))
            self.close()
            self._base = name, knowledge_base
        return self._base[1]


class _ChatModel(LocalModel):
    """A `ChatModel` for `khaosz.rag.answer.ask` that records finish reason and reasoning."""

    def __init__(self, generator: Generator, settings: Settings) -> None:
        super().__init__(generator)
        self._settings = settings
        self.reason: str | None = None
        self._reasoning: list[Part] = []

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        settings = self._settings
        params = SamplingParams(
            max_tokens, temperature, seed=settings.seed, thinking_budget=settings.thinking_budget
        )
        kwargs = _template_kwargs(self._generator, settings)
        ids = self._generator.chat_ids(messages, template_kwargs=kwargs)
        for part in self.parts(ids, params):
            if part.kind == "reasoning":
                self._reasoning.append(part)
            else:
                yield part.text

    def parts(self, ids: list[int], params: SamplingParams) -> Iterator[Part]:
        """Raises `GenerationError` at once for a prompt that is too long."""
        pieces = self._generator.stream(ids, params)
        end = self._generator.tokenizer.decode(ids[-8:])  # enough for <think> and a line break
        return self._parse(pieces, PartStream(thinking=opens_thought(end)))

    def _parse(self, pieces: Iterator[Piece], parts: PartStream) -> Iterator[Part]:
        for piece in pieces:
            yield from text_parts(parts.feed(piece.text))
            self.reason = piece.finish_reason
        yield from text_parts(parts.finish())

    def take_reasoning(self) -> list[Part]:
        taken, self._reasoning = self._reasoning, []
        return taken


def sampling(settings: Settings, defaults: Mapping[str, float]) -> SamplingParams:
    """Raises GenerationError for a value out of range."""
    return SamplingParams(**settings.in_force(defaults))  # the names are the same


def _template_kwargs(generator: Generator, settings: Settings) -> dict[str, Any]:
    return generator.thinking.template_kwargs(None, settings.think)
