"""Token ids of texts and conversations, as vLLM's /tokenize returns them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, model_validator

from khaosz.inference.generator import Generator
from khaosz.serve.errors import errors
from khaosz.serve.messages import MAX_MESSAGES, Message, RequestModel
from khaosz.serve.models import Models
from khaosz.serve.prompts import COUNTED
from khaosz.serve.replies import Reply
from khaosz.serve.schema import TemplateKwargs, Tokens, Truncation
from khaosz.serve.truncation import last_turns, prompt_room


class TokenizeRequest(RequestModel):
    """A prompt to continue, or messages followed by the assistant's marker. `truncation` and
    `max_tokens` as in a chat: the ids are those of the prompt that the model would get."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    truncation: Truncation | None = None
    max_tokens: Tokens | None = None
    chat_template_kwargs: TemplateKwargs | None = None

    @model_validator(mode="after")
    def _check_one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        if self.chat_template_kwargs is not None and self.messages is None:
            raise ValueError("chat_template_kwargs needs messages")
        if self.truncation == "auto" and self.messages is None:
            raise ValueError("truncation needs messages")
        return self


class Tokenized(Reply):
    """`max_model_len`: the model's context. `left_out`: messages that are not part of the prompt;
    with `truncation: auto` only."""

    count: int
    max_model_len: int
    tokens: list[int]
    left_out: int | None = None


def token_routes(models: Models) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/tokenize",
        response_model=Tokenized,
        response_model_exclude_unset=True,
        responses=errors(400, 404, 503),
    )
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a prompt or a conversation."""
        use = await models.take(request.model)
        try:
            return await asyncio.to_thread(_tokenized, request, use.generator)
        finally:
            models.give_back(use)

    return router


def _tokenized(request: TokenizeRequest, generator: Generator) -> dict[str, Any]:
    limit = COUNTED * generator.context
    more = {}
    if request.messages is not None:
        kwargs = generator.thinking.template_kwargs(request.chat_template_kwargs, None)
        kept: Sequence[Message] = request.messages
        if request.truncation == "auto":
            room = prompt_room(request.max_tokens, generator)
            kept, more["left_out"] = last_turns(kept, room, generator, (), kwargs)
        messages = [message.for_template() for message in kept]
        ids = generator.chat_ids(messages, template_kwargs=kwargs, limit=limit)
    else:
        assert request.prompt is not None
        ids = generator.prompt_ids(request.prompt, limit=limit)
    return {"count": len(ids), "max_model_len": generator.context, "tokens": ids, **more}
