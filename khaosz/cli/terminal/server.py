"""Answers by a server with OpenAI's API: ours, or another."""

from __future__ import annotations

from typing import Any

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
from khaosz.errors import DataError, ModelError, ServerError, nearest
from khaosz.inference.parts import PartStream
from khaosz.rag.models.http_client import checked, deltas, read_events, read_json

_OURS = "knowledge bases are KHAOSZ's own: another server has none"


class ServerPartner:
    """Raises `ServerError` where the server can't be reached, `ModelError` for a model that it
    hasn't. Without a name it takes the first model that chats."""

    def __init__(self, url: str, name: str | None = None) -> None:
        self._url = checked(url)
        self._cards = self._read_cards()
        self._counts = True  # until it turns out that it can't count tokens
        chats = [card["id"] for card in self._cards if card.get("kind", "chat") == "chat"]
        if name is None and not chats:
            raise ModelError(f"{self._url} has no model that chats", hint="--model NAME")
        self.name = chats[0] if name is None else self._known(name)

    @property
    def about(self) -> str:
        context = self._context
        return f"at {self._url}" + (f", context {context} tokens" if context else "")

    def models(self) -> list[str]:
        self._cards = self._read_cards()
        return [card["id"] for card in self._cards if card.get("kind", "chat") == "chat"]

    def choose(self, name: str) -> None:
        self._cards = self._read_cards()
        self.name = self._known(name)

    def bases(self) -> list[str]:
        try:
            data = read_json(f"{self._url}/knowledge_bases")["data"]
            return [str(base["id"]) for base in data]
        except (KeyError, TypeError):
            raise ServerError(f"{self._url}/knowledge_bases is no list", hint=_OURS) from None
        except ServerError as error:
            if error.status in (404, 405):
                raise ServerError(f"{self._url} keeps no documents", hint=_OURS) from None
            raise

    def open_base(self, name: str) -> None:
        there = self.bases()
        if name not in there:
            guess = nearest(name, there)
            hint = f"did you mean {guess}?" if guess else "/docs lists those that are there"
            raise DataError(f"no knowledge base '{name}' at {self._url}", hint=hint)

    def check(self, settings: Settings) -> None:
        """The server will say."""

    def close(self) -> None:
        pass

    def answer(self, conversation: Conversation, message: str) -> Events:
        asked = conversation.asking(message)
        turns = self._fitting(conversation, asked)
        while True:
            events = self._events(conversation, turns)
            try:
                first = next(events, None)
                break
            except ServerError as error:
                # What can't count says so when it is too late.
                if error.code != "context_length_exceeded" or len(turns) <= 1:
                    raise
            turns = turns[2:]
        if len(turns) < len(asked):
            yield Forgotten((len(asked) - len(turns)) // 2)
        if first is not None:
            yield first
        yield from events

    def _events(self, conversation: Conversation, turns: Turns) -> Events:
        parts = PartStream()  # where a server leaves <think> in the text
        reason: str | None = None
        cited: list[Any] = []
        given: list[Any] = []
        for event in read_events(f"{self._url}/chat/completions", self._body(conversation, turns)):
            retrieval = event.get("retrieval") or {}
            given += (retrieval.get("hits") or []) if retrieval.get("found") else []
            for delta, ended in deltas(event):
                reason = ended or reason
                cited += delta.get("citations") or []
                if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                    yield Part(str(thought), thought=True)
                yield from told_apart(parts.feed(str(delta.get("content") or "")))
        yield from told_apart(parts.finish())
        yield Ended(reason, *_sources(cited, given))

    def _body(self, conversation: Conversation, turns: Turns) -> dict[str, Any]:
        settings = conversation.settings
        body: dict[str, Any] = {
            "model": self.name,
            "messages": conversation.with_system(turns),
            "stream": True,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        if conversation.documents is not None:  # greedy, since it shall quote
            body |= {"knowledge_base": conversation.documents, "temperature": 0.0}
        # Not every server knows these: those that were left as they are stay unsaid.
        neutral = Settings()
        for name in ("seed", "top_k", "min_p", "repetition_penalty"):
            if (value := getattr(settings, name)) != getattr(neutral, name):
                body[name] = value
        return body

    def _fitting(self, conversation: Conversation, turns: Turns) -> Turns:
        """The last turns that have room, as far as the server counts tokens."""
        context = self._context
        if not self._counts or not context:
            return turns
        room = min(conversation.settings.max_tokens, context // 4)
        address = self._url.removesuffix("/v1") + "/tokenize"
        while len(turns) > 1:
            body = {"model": self.name, "messages": conversation.with_system(turns)}
            try:
                count = read_json(address, body)["count"]
            except (ServerError, KeyError, TypeError):
                self._counts = False
                return turns
            if count + room <= context:
                return turns
            turns = turns[2:]
        return turns

    @property
    def _context(self) -> int | None:
        card = next((card for card in self._cards if card["id"] == self.name), {})
        found = card.get("context") or card.get("max_model_len")
        return found if isinstance(found, int) else None

    def _read_cards(self) -> list[dict[str, Any]]:
        answer = read_json(f"{self._url}/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(cards, list) or not all(
            isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
        ):
            hint = "its address ends in /v1 with most servers"
            raise ServerError(f"{self._url}/models is no list of models", hint=hint)
        return cards

    def _known(self, name: str) -> str:
        names = [card["id"] for card in self._cards]
        if name not in names:
            guess = nearest(name, names)
            hint = f"did you mean {guess}?" if guess else f"it has {', '.join(names[:8])}"
            raise ModelError(f"no model '{name}' at {self._url}", hint=hint)
        return name


def _sources(cited: list[Any], given: list[Any]) -> tuple[tuple[Source, ...], bool]:
    listed = cited or given
    try:
        sources = tuple(
            Source(each["number"], each["doc"], each.get("page"), each["start"], each["end"])
            for each in listed
        )
    except (KeyError, TypeError, AttributeError):
        raise ServerError("the server lists its sources in a way not known here") from None
    return sources, bool(cited) or not given
