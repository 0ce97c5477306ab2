"""The routes of embedders and rerankers: /v1/embeddings as OpenAI has it, /v1/rerank as Jina and
Cohere have it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter
from pydantic import Field

from khaosz.serve.errors import ApiError, errors
from khaosz.serve.replies import Reply
from khaosz.serve.retrieval_models import RetrievalModels, SharedEmbedder
from khaosz.serve.schema import RequestModel

MAX_INPUTS = 2048

T = TypeVar("T")
Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(RequestModel):
    """`input_type` is ours: some models want another prefix before a question than before what is
    searched."""

    model: str
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    input_type: Literal["passage", "query"] | None = None


class Embedding(Reply):
    """`embedding`: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    """0 where the embedder does not count tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Reply):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Document(RequestModel):
    text: Text


class RerankRequest(RequestModel):
    model: str
    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None


class Ranked(Reply):
    """`relevance_score`: from 0 to 1."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class Ranking(Reply):
    model: str
    results: list[Ranked]


def vector_routes(retrieval: RetrievalModels) -> APIRouter:
    router = APIRouter()
    # Each is used by one at a time. Who waits for it takes no thread that chats are prepared in.
    threads = {
        name: ThreadPoolExecutor(1, thread_name_prefix=f"khaosz-{name}")
        for name in (*retrieval.embedders, *retrieval.rerankers)
    }

    async def in_turn(name: str, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads.get(name), work)

    @router.post(
        "/v1/embeddings",
        responses=errors(400, 404),
        response_model=Embeddings,
        response_model_exclude_unset=True,
    )
    async def embeddings(asked: EmbeddingRequest) -> dict[str, Any]:
        """Vectors of length 1."""
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        vectors, count = await in_turn(asked.model, lambda: _embedded(retrieval, asked, texts))
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(asked, vector)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": asked.model, "data": data, "usage": usage}

    @router.post(
        "/v1/rerank",
        responses=errors(400, 404),
        response_model=Ranking,
        response_model_exclude_unset=True,
    )
    async def rerank(asked: RerankRequest) -> dict[str, Any]:
        """Passages by how well they answer a query, best first."""
        texts = [each if isinstance(each, str) else each.text for each in asked.documents]
        scores = await in_turn(
            asked.model, lambda: retrieval.reranker(asked.model).scores(asked.query, texts)
        )
        found = 1 / (1 + np.exp(-scores.astype(np.float64)))
        results: list[dict[str, Any]] = []
        for i in np.argsort(-scores, kind="stable")[: asked.top_n].tolist():
            results.append({"index": i, "relevance_score": float(found[i])})
            if asked.return_documents:
                results[-1]["document"] = {"text": texts[i]}
        return {"model": asked.model, "results": results}

    return router


def _embedded(
    retrieval: RetrievalModels, asked: EmbeddingRequest, texts: Sequence[str]
) -> tuple[np.ndarray, int]:
    embedder: SharedEmbedder = retrieval.embedder(asked.model)
    if asked.dimensions not in (None, embedder.dimension):
        raise ApiError(
            400,
            f"{asked.model} has {embedder.dimension} dimensions, no others",
            param="dimensions",
        )
    embed = embedder.queries if asked.input_type == "query" else embedder.passages
    return embed(texts), embedder.tokens(texts)


def _encoded(asked: EmbeddingRequest, vector: np.ndarray) -> list[float] | str:
    if asked.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    found: list[float] = vector.tolist()
    return found
