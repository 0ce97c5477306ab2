"""Response bodies, for the OpenAPI document: OpenAI's, and this service's own.

Most responses are written as plain JSON; the tests validate them against these models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from khaosz.data.tokenizer.thinking import ThinkingKind
from khaosz.errors import DocumentCode


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


# ------------------------------------------------------------------------------- models and health


class ModelCard(Reply):
    """`context` in tokens. `parent`: the model that an adapter belongs to. Of chat models:
    `thinking`: whether answers begin with thoughts, by the chat template, and whether
    enable_thinking switches them; `sampling`: parameters of requests that name none; `languages`:
    those that the catalogue knows of, None for other models."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["chat", "embedding", "rerank"]
    context: int | None
    parent: str | None
    thinking: ThinkingKind | None = None
    sampling: dict[str, float] | None = None
    languages: list[str] | None = None


class LanguageWarningReply(Reply):
    """The model is known to lack the `language` of the request's last message, its first in that
    language; `model` of the catalogue has it. `message` is in that language."""

    code: Literal["language"]
    language: Literal["zh", "en"]
    model: str
    message: str


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class Live(Reply):
    status: Literal["live"]


class Ready(Reply):
    status: Literal["ready"]
    models: dict[str, bool] | None = None  # which are loaded; only with the key
    memory: dict[str, dict[str, int]] | None = None  # bytes by part of each loaded model; as above


# ------------------------------------------------------------------------------- knowledge bases

Code = (
    DocumentCode
    | Literal[
        "partly",  # the file is ready, and a part of it could not be read
        "embedder_failed",
        "base_unreadable",
        "embedder_unusable",
        "unexpected",
    ]
)


class BaseReply(Reply):
    """chunks: passages; embedded: those with a vector; bytes: size of the uploaded files. error:
    why the base cannot be used; code: a stable name of the error."""

    id: str
    object: Literal["knowledge_base"]
    created: int
    embedder: str | None
    files: int
    chunks: int
    embedded: int
    bytes: int
    error: str | None
    code: Code | None


class BaseList(Reply):
    object: Literal["list"]
    data: list[BaseReply]


class FileReply(Reply):
    """error: why the file failed, or which part could not be read; code: a stable name of it."""

    id: str
    object: Literal["file"]
    name: str
    bytes: int
    sha256: str
    status: Literal["queued", "reading", "embedding", "ready", "failed"]
    error: str | None
    code: Code | None
    chunks: int
    embedded: int
    created: int


class FileList(Reply):
    object: Literal["list"]
    data: list[FileReply]


class Deleted(Reply):
    id: str
    object: Literal["knowledge_base", "file"]
    deleted: Literal[True]


class LegReply(Reply):
    rank: int
    score: float


class HitReply(Reply):
    """Characters `start` to `end` of the text with the SHA-256 `hash`. Pages and lines count from 1
    and are None where a format has none. legs: rank and score by each search method."""

    number: int
    doc: str
    doc_id: str
    hash: str
    start: int
    end: int
    page: int | None
    page_end: int | None
    line: int | None
    line_end: int | None
    headings: list[str]
    text: str
    score: float
    legs: dict[Literal["lexical", "dense", "rerank"], LegReply]


class CitationReply(Reply):
    """`[number]` in an answer: characters `start` to `end` of the text with the SHA-256 `hash`;
    pages and lines as in a hit."""

    number: int
    hash: str
    start: int
    end: int
    doc: str
    doc_id: str
    page: int | None
    page_end: int | None
    line: int | None
    line_end: int | None
    headings: list[str]
    text: str


class QuoteReply(CitationReply):
    """The sentence or table row that answers, at its own place; `number`: of the hit that it is
    from. answer: it on one line, of a row each cell with its head."""

    answer: str


class SearchReply(Reply):
    """quote: None where no sentence answers the query."""

    object: Literal["search"]
    query: str
    mode: Literal["lexical", "dense", "hybrid"]
    hits: list[HitReply]
    quote: QuoteReply | None


class PassageReply(Reply):
    """`text` starts at character `text_start` of the document, which has `length` characters."""

    hash: str
    doc: str
    length: int
    page: int | None
    start: int
    end: int
    text_start: int
    text: str


# -------------------------------------------------------------------------- chats and completions

Reason = Literal["stop", "length", "tool_calls"]


class TokenLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class Logprobs(Reply):
    content: list[ContentLogprob]
    refusal: None


class CalledFunction(Reply):
    name: str
    arguments: str


class Called(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction


class RetrievalReply(Reply):
    """The search behind an answer. `number` of a hit: of the prompt's passage that contains it;
    hits outside the prompt have higher numbers. found: whether a passage seems relevant. asked:
    whether the model was asked, which `retrieval.ask_anyway` also causes. prompt: what it got.
    left_out: passages that did not fit into the context; narrowed: the best one was cut."""

    query: str
    found: bool
    asked: bool
    hits: list[HitReply]
    prompt: str | None
    left_out: int
    narrowed: bool


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None
    citations: list[CitationReply] | None = None
    not_found: Literal[True] | None = None


class ChatChoice(Reply):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Reason


class TextChoice(Reply):
    index: int
    text: str
    logprobs: None
    finish_reason: Reason


class CachedTokens(Reply):
    cached_tokens: int


class TokensUsed(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatCompletion(Reply):
    """left_out: the oldest messages that the model did not see; with `truncation: auto` only.
    warning: in a stream, in the first chunk."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokensUsed
    retrieval: RetrievalReply | None = None
    left_out: int | None = None
    warning: LanguageWarningReply | None = None


class TextCompletion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokensUsed


def streamed(model: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses of a route that answers with `model`, or with server-sent events."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "description": "A chunk, or an error; [DONE] in the last event.",
    }
    # OpenAPI 3.1 does not define it, but tools read this as the schema of each event.
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    events = {"text/event-stream": {"schema": event}}
    return {200: {"model": model, "description": "The answer.", "content": events}}


def exported(description: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses of a route that answers with JSON lines."""
    content = {"application/jsonl": {"schema": {"type": "string"}}}
    return {200: {"description": description, "content": content}}


def json_lines(lines: Iterable[str | bytes], name: str) -> StreamingResponse:
    """A download with this file name."""
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(lines, 200, headers, "application/jsonl")
