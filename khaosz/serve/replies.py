"""What is answered, for the OpenAPI document: OpenAI's layouts, and what is ours in them.

Answers are written as plain JSON; the tests hold them against these.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from khaosz.errors import DocumentCode


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


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


class LegReply(Reply):
    rank: int
    score: float


class HitReply(Reply):
    """Characters `start` to `end` of the text with the SHA-256 `hash`. legs: what each way of
    searching says of it."""

    number: int
    doc: str
    doc_id: str
    hash: str
    start: int
    end: int
    page: int | None
    headings: list[str]
    text: str
    score: float
    legs: dict[Literal["lexical", "dense", "rerank"], LegReply]


class RetrievalReply(Reply):
    """What was found for an answer. `number`: of the passage of the prompt that a hit is in; hits
    that are in none have higher ones. prompt: what the model was sent, if it was. left_out:
    passages that the context had no room for; narrowed: of the best one, only a part is in."""

    query: str
    found: bool
    hits: list[HitReply]
    prompt: str | None
    left_out: int
    narrowed: bool


class CitationReply(Reply):
    """`[number]` in an answer: characters `start` to `end` of the text with the SHA-256 `hash`."""

    number: int
    hash: str
    start: int
    end: int
    doc: str
    doc_id: str
    page: int | None
    text: str


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None
    citations: list[CitationReply] | None = None


Reason = Literal["stop", "length", "tool_calls"]


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
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokensUsed
    retrieval: RetrievalReply | None = None


class TextCompletion(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: TokensUsed


class ModelCard(Reply):
    """`context` in tokens. `parent`: the model that an adapter is put on."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["chat", "embedding", "rerank"]
    context: int | None
    parent: str | None


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class Live(Reply):
    status: Literal["live"]


class Ready(Reply):
    status: Literal["ready"]
    models: dict[str, bool]


def streamed(model: type[Reply]) -> dict[int | str, dict[str, Any]]:
    """Of a route that answers with this, or with server-sent events where a stream is asked for."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "description": "A chunk, or an error; of the last event, [DONE].",
    }
    # OpenAPI 3.1 does not say so, but what reads it takes this for the schema of each event.
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    events = {"text/event-stream": {"schema": event}}
    return {200: {"model": model, "description": "The answer.", "content": events}}


# What is wrong with a file or a knowledge base.
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


class IngestError(NamedTuple):
    code: Code
    message: str


UNREADABLE = IngestError(
    "base_unreadable", "cannot be read or written; is its file broken, or the disk full?"
)
FAILING = IngestError(
    "embedder_unusable",
    "its embedder is not offered, cannot be used, or is another than it was made by",
)
UNEXPECTED = IngestError("unexpected", "met an error; the server's log has more")


class BaseReply(Reply):
    """chunks: passages; embedded: those that are found by meaning too; bytes: of the files as they
    came. error: why the base cannot be used, and code, a word of it that stays."""

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
    """error: why it failed, or what of it could not be read; code: a word of it that stays."""

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


class SearchReply(Reply):
    object: Literal["search"]
    query: str
    mode: Literal["lexical", "dense", "hybrid"]
    hits: list[HitReply]


class PassageReply(Reply):
    """`text` begins at character `text_start` of the document, which has `length`."""

    hash: str
    doc: str
    length: int
    page: int | None
    start: int
    end: int
    text_start: int
    text: str
