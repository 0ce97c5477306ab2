"""Token ids of texts and conversations, as vLLM's /tokenize returns them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, model_validator

from khaosz.inference.generator import Generator
from khaosz.serve.errors import errors
from khaosz.serve.messages import MAX_MESSAGES, Message, RequestModel
from khaosz.serve.models import Models
from khaosz.serve.replies import Reply

_CONTEXTS = 16  # a text of more tokens than so many contexts is refused before it is read in full


class TokenizeRequest(RequestModel):
    """A prompt to continue, or messages followed by the assistant's marker."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None

    @model_validator(mode="after")
    def _check_one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        return self


class Tokenized(Reply):
    """`max_model_len`: the model's context."""

    count: int
    max_model_len: int
    tokens: list[int]


def token_routes(models: Models) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", response_model=Tokenized, responses=errors(400, 404, 503))
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a prompt or a conversation."""
        use = await models.take(request.model)
        try:
            tokens = await asyncio.to_thread(_ids, request, use.generator)
        finally:
            models.give_back(use)
        return {"count": len(tokens), "max_model_len": use.generator.context, "tokens": tokens}

    return router


def _ids(request: TokenizeRequest, generator: Generator) -> list[int]:
    limit = _CONTEXTS * generator.context
    if request.messages is not None:
        messages = [message.for_template() for message in request.messages]
        return generator.chat_ids(messages, limit=limit)
    assert request.prompt is not None
    return generator.prompt_ids(request.prompt, limit=limit)
