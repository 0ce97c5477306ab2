"""What is answered, for the OpenAPI document: OpenAI's layouts, and what is ours in them.

Answers are written as plain JSON; the tests hold them against these.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


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


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None


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
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: {"model": model, "description": "The answer.", "content": events}}
