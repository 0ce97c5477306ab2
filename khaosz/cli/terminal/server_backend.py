"""Chat with a model of an OpenAI-compatible server: ours, or another."""

from __future__ import annotations

from typing import Any

from khaosz.cli.terminal.conversation import (
    Conversation,
    Event,
    Events,
    Finished,
    Settings,
    Source,
    Truncated,
    Turns,
    Warned,
    text_parts,
    with_thought,
)
from khaosz.errors import ConfigError, DataError, ModelError, ServerError, did_you_mean
from khaosz.inference.parts import Part, PartStream
from khaosz.rag.models.http_client import check_url, deltas, read_events, read_json
from khaosz.rag.search.hit import location

_OURS = "only a KHAOSZ server has knowledge bases"


class ServerBackend:
    """Without a name, the first chat model is used. Raises `ServerError` if the server cannot be
    reached, `ModelError` for a model that it does not have."""

    def __init__(self, url: str, name: str | None = None) -> None:
        self._url = check_url(url)
        self._cards = self._read_cards()
        self._can_count = True  # assumed until /tokenize fails
        names = self._chat_models()
        if name is None and not names:
            raise ModelError(f"{self._url} has no chat model", hint="--model NAME")
        self.name = names[0] if name is None else self._check_name(name)

    @property
    def about(self) -> str:
        context = self._context
        return f"at {self._url}" + (f", context {context} tokens" if context else "")

    @property
    def sampling(self) -> dict[str, float]:
        values = self._card.get("sampling")
        numbers = values.items() if isinstance(values, dict) else ()
        return {name: value for name, value in numbers if isinstance(value, int | float)}

    @property
    def thinking(self) -> str | None:
        kind = self._card.get("thinking")
        return kind if isinstance(kind, str) else None

    def _count(self, text: str) -> int | None:
        if not self._can_count:
            return None
        try:
            count = read_json(self._tokenize, {"model": self.name, "prompt": text})["count"]
        except (ServerError, KeyError, TypeError):
            return None
        return count if isinstance(count, int) else None

    def resize(self, context: int) -> None:
        raise ConfigError("the context is the server's", hint="start it with --context")

    def models(self) -> list[str]:
        self._cards = self._read_cards()
        return self._chat_models()

    def choose(self, name: str) -> None:
        self._cards = self._read_cards()
        self.name = self._check_name(name)

    def knowledge_bases(self) -> list[str]:
        try:
            data = read_json(f"{self._url}/knowledge_bases")["data"]
            return [str(base["id"]) for base in data]
        except (KeyError, TypeError):
            raise ServerError(f"{self._url}/knowledge_bases is not a list", hint=_OURS) from None
        except ServerError as error:
            if error.status in (404, 405):
                raise ServerError(f"{self._url} has no knowledge bases", hint=_OURS) from None
            raise

    def open_knowledge_base(self, name: str) -> None:
        names = self.knowledge_bases()
        if name not in names:
            hint = did_you_mean(name, names, "/docs lists the knowledge bases")
            raise DataError(f"knowledge base '{name}' not found at {self._url}", hint=hint)

    def check(self, settings: Settings) -> None:
        """The server checks them."""

    def close(self) -> None:
        pass

    def answer(self, conversation: Conversation, message: str) -> Events:
        turns = conversation.with_message(message)
        kept = self._truncate(conversation, turns)
        while True:
            events = self._events(conversation, kept)
            try:
                first = next(events, None)
                break
            except ServerError as error:
                # A server without /tokenize reports a prompt that is too long only here.
                if error.code != "context_length_exceeded" or len(kept) <= 1:
                    raise
            kept = kept[2:]
        if len(kept) < len(turns):
            yield Truncated((len(turns) - len(kept)) // 2)
        yield from with_thought(_chained(first, events), self._count)

    def _events(self, conversation: Conversation, turns: Turns) -> Events:
        parts = PartStream()  # for servers that leave <think> in the text
        reason: str | None = None
        cited: list[Any] = []
        hits: list[Any] = []
        asked = True
        for event in read_events(f"{self._url}/chat/completions", self._body(conversation, turns)):
            retrieval = event.get("retrieval") or {}
            hits += retrieval.get("hits") or []
            asked = asked and bool(retrieval.get("asked", retrieval.get("found", True)))
            if isinstance(warning := event.get("warning"), dict):
                yield Warned(str(warning.get("language")), str(warning.get("message")))
            for delta, finish_reason in deltas(event):
                reason = finish_reason or reason
                cited += delta.get("citations") or []
                if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
                    yield Part("reasoning", str(reasoning))
                yield from text_parts(parts.feed(str(delta.get("content") or "")))
        yield from text_parts(parts.finish())
        yield Finished(reason, *_sources(cited, hits), asked)

    def _body(self, conversation: Conversation, turns: Turns) -> dict[str, Any]:
        settings = conversation.settings
        body: dict[str, Any] = {
            "model": self.name,
            "messages": conversation.with_system(turns),
            "stream": True,
            # Not every server supports all of these: what is not set is not sent.
            **settings.asked(),
        }
        if settings.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": settings.think}
        if conversation.documents is not None:  # greedy, so that the answer quotes
            body |= {"knowledge_base": conversation.documents, "temperature": 0.0}
            if conversation.anyway:
                body["retrieval"] = {"ask_anyway": True}
        return body

    def _truncate(self, conversation: Conversation, turns: Turns) -> Turns:
        """The last turns that fit into the context; all, if the server cannot count tokens."""
        context = self._context
        if not self._can_count or not context:
            return turns
        answer_tokens = min(conversation.settings.max_tokens, context // 4)
        while len(turns) > 1:
            body = {"model": self.name, "messages": conversation.with_system(turns)}
            try:
                count = read_json(self._tokenize, body)["count"]
            except (ServerError, KeyError, TypeError):
                self._can_count = False
                return turns
            if count + answer_tokens <= context:
                return turns
            turns = turns[2:]
        return turns

    @property
    def _tokenize(self) -> str:
        return self._url.removesuffix("/v1") + "/tokenize"

    @property
    def _card(self) -> dict[str, Any]:
        return next((card for card in self._cards if card["id"] == self.name), {})

    @property
    def _context(self) -> int | None:
        length = self._card.get("context") or self._card.get("max_model_len")
        return length if isinstance(length, int) else None

    def _chat_models(self) -> list[str]:
        return [card["id"] for card in self._cards if card.get("kind", "chat") == "chat"]

    def _read_cards(self) -> list[dict[str, Any]]:
        answer = read_json(f"{self._url}/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(
            isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
        ):
            hint = "most addresses end in /v1"
            raise ServerError(f"{self._url}/models is not a list of models", hint=hint)
        return cards

    def _check_name(self, name: str) -> str:
        names = [card["id"] for card in self._cards]
        if name not in names:
            hint = did_you_mean(name, names, f"available: {', '.join(names[:8])}")
            raise ModelError(f"model '{name}' not found at {self._url}", hint=hint)
        return name


def _chained(first: Event | None, events: Events) -> Events:
    if first is not None:
        yield first
    yield from events


def _sources(cited: list[Any], hits: list[Any]) -> tuple[tuple[Source, ...], bool]:
    try:
        sources = tuple(Source(each["number"], _place(each)) for each in cited or hits)
    except (KeyError, TypeError, AttributeError):
        raise ServerError("the server's citations have an unknown format") from None
    return sources, bool(cited) or not hits


def _place(passage: dict[str, Any]) -> str:
    """Of a server of any version. Raises KeyError and TypeError for another format."""
    page, page_end, line, line_end = (
        value if isinstance(value := passage.get(name), int) else None
        for name in ("page", "page_end", "line", "line_end")
    )
    headings, text = passage.get("headings") or (), passage.get("text") or ""
    return location(passage["doc"], headings, text, (page, page_end), (line, line_end))
