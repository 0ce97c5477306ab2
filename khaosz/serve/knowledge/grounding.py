"""A chat about a knowledge base: passages for its last question, and what an answer cites."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from khaosz.errors import GenerationError
from khaosz.rag.answer import citations, contextual_query, has_relevant, rewrite_messages
from khaosz.rag.prompt import REFUSAL, Prompt, build_prompt, language_of
from khaosz.rag.search.hit import Hit
from khaosz.rag.search.search import LONGEST_QUERY as LONGEST_SEARCHED
from khaosz.rag.search.search import merge_neighbours
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.search import LONGEST_QUERY, Searcher, hit_bodies

Messages = list[dict[str, Any]]  # as templates take them


@dataclass(frozen=True)
class RetrievalContext:
    """What an answer stands on. messages: to be sent to the model, with passages in the last
    question; where nothing good was found, no model is asked, and the answer is `refusal`."""

    messages: Messages
    query: str
    hits: list[Hit]
    prompt: Prompt | None
    refusal: str

    @property
    def passages(self) -> Sequence[Hit]:
        return self.prompt.passages if self.prompt else ()

    def body(self) -> dict[str, Any]:
        prompt = self.prompt
        return {
            "query": self.query,
            "found": prompt is not None,
            "hits": self._numbered(),
            "prompt": prompt.text if prompt else None,
            "left_out": prompt.left_out if prompt else 0,
            "narrowed": prompt.narrowed if prompt else False,
        }

    def _numbered(self) -> list[dict[str, Any]]:
        """Hits by the numbers that an answer cites them by: neighbours are one passage there."""
        bodies = hit_bodies(self.hits)
        spare = len(self.passages)
        for hit, body in zip(self.hits, bodies, strict=True):
            within = (n for n, passage in enumerate(self.passages, 1) if _in(hit, passage))
            number = next(within, None)
            if number is None:
                spare += 1
            body["number"] = number or spare
        return bodies

    def cited(self, used: Sequence[int]) -> list[dict[str, Any]]:
        """The citations of an answer that uses these numbers."""
        found = citations(used, self.passages)
        return [{**asdict(each), "text": self.passages[each.number - 1].text} for each in found]


async def grounds_for(
    messages: Messages,
    search: Searcher,
    count: Callable[[Messages], int],
    room: int,
    ask_model: Callable[[Messages], Awaitable[str]],
) -> RetrievalContext:
    """`count`: tokens of a conversation, of which there may be `room`. `ask_model` puts a follow-up
    so that it can be searched for.

    Raises `ApiError` for a chat without a question, one that leaves no room for a passage, and a
    base that cannot be used.
    """
    at = max((i for i, each in enumerate(messages) if each["role"] == "user"), default=None)
    question = "" if at is None else messages[at]["content"]
    if at is None or not question.strip() or len(question) > LONGEST_QUERY:
        message = f"with a knowledge base, a user asks something of {LONGEST_QUERY:,} characters"
        raise ApiError(400, f"{message} at most", param="messages")
    before, behind = messages[:at], messages[at + 1 :]
    query = question
    if any(each["role"] == "user" for each in before):
        rewritten = await ask_model(rewrite_messages(question, before))
        query = contextual_query(question, before, rewritten)[:LONGEST_SEARCHED]
    hits, found = await search.run(
        query, lambda base, hits: (hits, has_relevant(base, query, hits))
    )
    refusal = REFUSAL[language_of(question)]
    if not found:
        return RetrievalContext(messages, query, hits, None, refusal)

    def built() -> Prompt:
        return build_prompt(
            question,
            merge_neighbours(hits),
            lambda asked: count([*before, *asked, *behind]),
            room,
        )

    try:
        prompt = await asyncio.to_thread(built)
    except GenerationError as error:
        code = "context_length_exceeded"
        raise ApiError(400, str(error), param="messages", code=code) from None
    return RetrievalContext([*before, *prompt.messages, *behind], query, hits, prompt, refusal)


def _in(hit: Hit, passage: Hit) -> bool:
    return hit.hash == passage.hash and hit.start < passage.end and passage.start < hit.end
