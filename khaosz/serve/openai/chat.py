"""The routes of chats and completions, whole or streamed."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from khaosz.serve.answering import Answering
from khaosz.serve.errors import errors
from khaosz.serve.openai.completion_output import CompletionLayout
from khaosz.serve.replies import ChatCompletion, TextCompletion, streamed
from khaosz.serve.schema import ChatRequest, CompletionRequest


def chat_routes(answering: Answering) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses={**streamed(ChatCompletion), **errors(400, 404, 409, 503, 504)},
        response_model=None,
    )
    async def chat(request: ChatRequest, raw_request: Request) -> Response:
        """Answer a conversation, as OpenAI's API does."""
        layout = CompletionLayout(chat=True, include_usage=request.include_usage)
        return await answering.chat(request, raw_request, layout)

    @router.post(
        "/v1/completions",
        responses={**streamed(TextCompletion), **errors(400, 404, 503, 504)},
        response_model=None,
    )
    async def complete(request: CompletionRequest, raw_request: Request) -> Response:
        """Continue a text, as OpenAI's older API does."""
        layout = CompletionLayout(chat=False, include_usage=request.include_usage)
        return await answering.complete(request, raw_request, layout)

    return router
