"""Search requests, and the text around a passage."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field

from khaosz.errors import KhaoszError
from khaosz.rag.answer import citations
from khaosz.rag.knowledge_base import KnowledgeBase
from khaosz.rag.models.protocols import Reranker
from khaosz.rag.quote import PASSAGES as QUOTE_PASSAGES
from khaosz.rag.quote import find_quote
from khaosz.rag.search.hit import Hit, Mode
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.ingest import Base
from khaosz.serve.retrieval_models import RetrievalModels, UnknownName
from khaosz.serve.schema import Retrieval

MAX_QUERY = 8000  # characters
_MAX_GLOB = 200
MAX_AROUND = 100_000  # characters before and after a passage, and of the passage

T = TypeVar("T")

_log = logging.getLogger("khaosz.serve")


class SearchRequest(Retrieval):
    """name: a glob that file names must match."""

    query: Annotated[str, Field(min_length=1, max_length=MAX_QUERY)]
    name: Annotated[str, Field(min_length=1, max_length=_MAX_GLOB)] | None = None


@dataclass(frozen=True)
class Searcher:
    """A knowledge base and the checked parameters of a search in it."""

    base: Base
    mode: Mode
    k: int
    reranker: Reranker | None

    async def run(
        self, query: str, use: Callable[[KnowledgeBase, list[Hit]], T], name: str | None = None
    ) -> T:
        """Search, and call `use` with the base and the hits. Raises `ApiError`."""
        if not query.strip():
            raise ApiError(400, "the query is empty", param="query")

        def work(base: KnowledgeBase) -> T:
            hits = base.search(query, self.k, mode=self.mode, name=name, reranker=self.reranker)
            return use(base, hits)

        return await self.base.read(work, embedder=self.mode != "lexical")


class _NamedReranker:
    """A reranker whose errors name it in the response."""

    def __init__(self, name: str, inner: Reranker) -> None:
        self._name, self._inner = name, inner

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        try:
            return self._inner.scores(query, passages)
        except KhaoszError as error:
            _log.warning("reranker %r: %s", self._name, error)
            message = f"the reranker {self._name!r} failed; a shorter query may help"
            raise ApiError(409, message, param="reranker") from None


async def searcher(base: Base, request: Retrieval, retrieval: RetrievalModels) -> Searcher:
    """Raises `ApiError`."""
    mode: Mode = request.mode or ("hybrid" if base.embedder else "lexical")
    if mode != "lexical" and base.embedder is None:
        message = f"{base.name!r} has no embedder, so its only mode is lexical"
        raise ApiError(400, message, param="mode")
    reranker = None
    if request.reranker is not None:
        reranker = await asyncio.to_thread(_reranker, retrieval, request.reranker)
    return Searcher(base, mode, request.k, reranker)


def _reranker(retrieval: RetrievalModels, name: str) -> Reranker:
    try:
        return _NamedReranker(name, retrieval.reranker(name))
    except UnknownName:
        known = ", ".join(retrieval.rerankers) or "none"
        message = f"reranker {name!r} not found; available: {known}"
        raise ApiError(400, message, param="reranker") from None
    except KhaoszError:
        raise ApiError(409, f"the reranker {name!r} cannot be opened", param="reranker") from None


def with_quote(
    query: str,
) -> Callable[[KnowledgeBase, list[Hit]], tuple[list[Hit], dict[str, Any] | None]]:
    """For `Searcher.run`: the hits, and the body of the sentence among them that answers."""

    def use(base: KnowledgeBase, hits: list[Hit]) -> tuple[list[Hit], dict[str, Any] | None]:
        quote = find_quote(base, query, hits[:QUOTE_PASSAGES])
        if quote is None:
            return hits, None
        number = next(n for n, hit in enumerate(hits, 1) if hit.chunk == quote.hit.chunk)
        (body,) = citations([1], [quote.hit])
        text = {"number": number, "text": quote.hit.text, "answer": quote.text}
        return hits, asdict(body) | text

    return use


def hit_bodies(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    return [{"number": number, **hit.as_dict()} for number, hit in enumerate(hits, 1)]


def passage(
    base: KnowledgeBase, digest: str, start: int, end: int | None, around: int
) -> dict[str, Any]:
    """Raises `ApiError` for an unknown document, and for a range outside it."""
    document = base.store.document_by_hash(digest)
    if document is None:
        raise ApiError(404, "no document has this hash")
    end = start if end is None else end
    if not start <= end <= document.length or end - start > MAX_AROUND:
        message = (
            f"start and end must be a range of at most {MAX_AROUND:,} in its"
            f" {document.length:,} characters"
        )
        raise ApiError(400, message, param="end")
    first = max(0, start - around)
    text = base.store.text(document.id)[first : end + around]
    pages = document.pages
    return {
        "hash": digest,
        "doc": document.name,
        "length": document.length,
        "page": sum(each <= start for each in pages) + 1 if pages else None,
        "start": start,
        "end": end,
        "text_start": first,
        "text": text,
    }
