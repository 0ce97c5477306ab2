"""Chats with a knowledge base: passages for the last question, citations of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from khaosz.errors import GenerationError
from khaosz.rag.answer import citations, contextual_query, rewrite_messages
from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.prompt import REFUSAL, Prompt, build_prompt, language_of
from khaosz.rag.relevance import has_relevant
from khaosz.rag.search.hit import Hit
from khaosz.rag.search.search import LONGEST_QUERY as MAX_SEARCHED
from khaosz.rag.search.search import merge_neighbours
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.search import MAX_QUERY, Searcher, hit_bodies

Messages = list[dict[str, Any]]  # of a chat template


@dataclass(frozen=True)
class RetrievalContext:
    """What an answer is based on. messages: for the model, with passages in the last question.
    found: whether a passage seems relevant. Where the model is not asked, `prompt` is None and the
    answer is `refusal`."""

    messages: Messages
    query: str
    hits: list[Hit]
    prompt: Prompt | None
    refusal: str
    found: bool = True

    @property
    def passages(self) -> Sequence[Hit]:
        return self.prompt.passages if self.prompt else ()

    def body(self) -> dict[str, Any]:
        prompt = self.prompt
        return {
            "query": self.query,
            "found": self.found,
            "asked": prompt is not None,
            "hits": self._numbered(),
            "prompt": prompt.text if prompt else None,
            "left_out": prompt.left_out if prompt else 0,
            "narrowed": prompt.narrowed if prompt else False,
        }

    def stored(self) -> dict[str, Any]:
        """The fields of a `StoredContext`."""
        citable = self.citations(range(1, len(self.passages) + 1))
        return {"messages": self.messages, "retrieval": self.body(), "passages": citable}

    def _numbered(self) -> list[dict[str, Any]]:
        """Hits with the numbers that an answer cites: neighbouring hits are one passage."""
        bodies = hit_bodies(self.hits)
        spare = len(self.passages)
        for hit, body in zip(self.hits, bodies, strict=True):
            within = (n for n, passage in enumerate(self.passages, 1) if _overlaps(hit, passage))
            number = next(within, None)
            if number is None:
                spare += 1
            body["number"] = number or spare
        return bodies

    def citations(self, used: Sequence[int]) -> list[dict[str, Any]]:
        """The citations of an answer that uses these numbers."""
        return [
            {**asdict(each), "text": self.passages[each.number - 1].text}
            for each in citations(used, self.passages)
        ]


@dataclass(frozen=True)
class StoredContext:
    """A `RetrievalContext` of an answer that is continued. passages: as they are cited, by
    number."""

    messages: Messages
    retrieval: dict[str, Any]
    passages: list[dict[str, Any]]
    prompt: None = None
    refusal: None = None

    def body(self) -> dict[str, Any]:
        return self.retrieval

    def citations(self, used: Sequence[int]) -> list[dict[str, Any]]:
        return [self.passages[number - 1] for number in used]

    def stored(self) -> dict[str, Any]:
        return {
            "messages": self.messages, "retrieval": self.retrieval, "passages": self.passages,
        }  # fmt: skip


async def retrieve_context(
    messages: Messages,
    search: Searcher,
    count: Callable[[Messages], int],
    room: int,
    ask_model: Callable[[Messages], Awaitable[str]],
    *,
    anyway: bool = False,
) -> RetrievalContext:
    """`count`: tokens of a conversation, at most `room`. `ask_model` rewrites a follow-up question
    as a query. `anyway`: the model is asked although no passage seems relevant.

    Raises `ApiError` for a chat without a question, one that leaves no room for a passage, and a
    base that cannot be used.
    """
    at = max((i for i, each in enumerate(messages) if each["role"] == "user"), default=None)
    question = "" if at is None else messages[at]["content"]
    if at is None or not question.strip() or len(question) > MAX_QUERY:
        message = f"a knowledge base needs a user message of 1 to {MAX_QUERY:,} characters"
        raise ApiError(400, message, param="messages")
    before, after = messages[:at], messages[at + 1 :]
    query = question
    if any(each["role"] == "user" for each in before):
        rewritten = await ask_model(rewrite_messages(question, before))
        query = contextual_query(question, before, rewritten)[:MAX_SEARCHED]

    def judge(base: KnowledgeBase, hits: list[Hit]) -> tuple[list[Hit], bool]:
        found = has_relevant(base, query, hits)
        return hits or (base.first_hits(search.k) if found or anyway else []), found

    hits, found = await search.run(query, judge)
    refusal = REFUSAL[language_of(question)]
    if not hits or not (found or anyway):
        return RetrievalContext(messages, query, hits, None, refusal, found)

    def build() -> Prompt:
        return build_prompt(
            question,
            merge_neighbours(hits),
            lambda turns: count([*before, *turns, *after]),
            room,
        )

    try:
        prompt = await asyncio.to_thread(build)
    except GenerationError as error:
        code = "context_length_exceeded"
        raise ApiError(400, str(error), param="messages", code=code) from None
    messages = [*before, *prompt.messages, *after]
    return RetrievalContext(messages, query, hits, prompt, refusal, found)


def _overlaps(hit: Hit, passage: Hit) -> bool:
    return hit.hash == passage.hash and hit.start < passage.end and passage.start < hit.end
