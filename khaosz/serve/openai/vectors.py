"""The routes of embedders and rerankers: OpenAI's /v1/embeddings, Jina's and Cohere's
/v1/rerank."""

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
from khaosz.serve.messages import Ignored, RequestModel
from khaosz.serve.replies import Reply
from khaosz.serve.retrieval_models import RetrievalModels, SharedEmbedder

MAX_INPUTS = 2048

T = TypeVar("T")
Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(RequestModel):
    """`input_type` is not OpenAI's: some models need different prefixes for queries and
    passages."""

    model: str
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    input_type: Literal["passage", "query"] | None = None
    user: Ignored = None


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


class Vectors:
    """Embedders and rerankers. Each runs one request at a time, in a thread of its own: waiting for
    it takes no thread from chats."""

    def __init__(self, retrieval: RetrievalModels) -> None:
        self.retrieval = retrieval
        self._threads = {
            name: ThreadPoolExecutor(1, thread_name_prefix=f"khaosz-{name}")
            for name in (*retrieval.embedders, *retrieval.rerankers)
        }

    async def embed(self, request: EmbeddingRequest) -> tuple[np.ndarray, int]:
        """float32 (texts, D), and how many tokens were read."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        return await self.in_turn(request.model, lambda: _embed(self.retrieval, request, texts))

    async def in_turn(self, name: str, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads.get(name), work)


def vector_routes(vectors: Vectors) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/embeddings",
        responses=errors(400, 404),
        response_model=Embeddings,
        response_model_exclude_unset=True,
    )
    async def embeddings(request: EmbeddingRequest) -> dict[str, Any]:
        """Vectors of length 1."""
        rows, count = await vectors.embed(request)
        data = [
            {"object": "embedding", "index": i, "embedding": _encode(request, vector)}
            for i, vector in enumerate(rows)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": request.model, "data": data, "usage": usage}

    @router.post(
        "/v1/rerank",
        responses=errors(400, 404),
        response_model=Ranking,
        response_model_exclude_unset=True,
    )
    async def rerank(request: RerankRequest) -> dict[str, Any]:
        """Passages by relevance to a query, best first."""
        texts = [each if isinstance(each, str) else each.text for each in request.documents]
        model, query = request.model, request.query
        scores = await vectors.in_turn(
            model, lambda: vectors.retrieval.reranker(model).scores(query, texts)
        )
        relevance = 1 / (1 + np.exp(-scores.astype(np.float64)))
        results: list[dict[str, Any]] = []
        for i in np.argsort(-scores, kind="stable")[: request.top_n].tolist():
            results.append({"index": i, "relevance_score": float(relevance[i])})
            if request.return_documents:
                results[-1]["document"] = {"text": texts[i]}
        return {"model": request.model, "results": results}

    return router


def _embed(
    retrieval: RetrievalModels, request: EmbeddingRequest, texts: Sequence[str]
) -> tuple[np.ndarray, int]:
    embedder: SharedEmbedder = retrieval.embedder(request.model)
    if request.dimensions not in (None, embedder.dimension):
        raise ApiError(
            400,
            f"{request.model} has {embedder.dimension} dimensions; no others are available",
            param="dimensions",
        )
    embed = embedder.queries if request.input_type == "query" else embedder.passages
    return embed(texts), embedder.tokens(texts)


def _encode(request: EmbeddingRequest, vector: np.ndarray) -> list[float] | str:
    if request.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
