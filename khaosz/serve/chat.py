"""The routes of answers: chats and completions, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.serve.answers import Answer, Form
from khaosz.serve.metrics import Meters
from khaosz.serve.models import Models, Use
from khaosz.serve.parts import THINK, THOUGHT
from khaosz.serve.refusals import Refused, errors
from khaosz.serve.replies import ChatCompletion, TextCompletion, streamed
from khaosz.serve.schema import ChatRequest, CompletionRequest
from khaosz.serve.tools import call_grammar, calls_of, introduced
from khaosz.serve.worker import Ticket


@dataclass(frozen=True)
class Question:
    """A request as the engine is asked it."""

    prompt: list[int]
    params: SamplingParams
    form: Form
    stream: bool
    include_usage: bool
    told_in: str  # the field that the prompt came in


def chat_routes(models: Models, meters: Meters, timeout: float) -> APIRouter:
    """`timeout`: seconds that a request may take, waiting included."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses={**streamed(ChatCompletion), **errors(400, 404, 503, 504)},
        response_model=None,
    )
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation, as OpenAI's API does."""
        models.check_room(asked.model)
        use = await models.take(asked.model)
        return await answered(use, request, lambda: chat_question(asked, use.generator))

    @router.post(
        "/v1/completions",
        responses={**streamed(TextCompletion), **errors(400, 404, 503, 504)},
        response_model=None,
    )
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Continue a text, as OpenAI's older API does."""
        models.check_room(asked.model)
        use = await models.take(asked.model)
        return await answered(use, request, lambda: text_question(asked, use.generator))

    async def answered(use: Use, request: Request, question: Callable[[], Question]) -> Response:
        """Gives the model back, however it ends."""
        with ExitStack() as undo:
            undo.callback(models.give_back, use)
            # Beside the loop and the engine: a long text takes a while.
            asked = await asyncio.to_thread(question)
            _check_context(asked, use.generator)
            ticket = await use.worker.submit(asked.prompt, asked.params, use.adapter)
            undo.pop_all()
        engine = use.generator.engine
        answer = Answer(asked.form, use.name, use.generator.tokenizer, engine.end_ids)
        watch = asyncio.create_task(_close_when_left(request, ticket))
        limit = asyncio.get_running_loop().call_later(timeout, ticket.expire)
        began = time.perf_counter()

        def done() -> None:
            ticket.close()
            watch.cancel()
            limit.cancel()
            models.give_back(use)
            meters.answered(use.name, answer.usage, began)

        if asked.stream:
            return EventStream(answer.events(ticket.outputs(), asked.include_usage), done)
        try:
            body = await answer.whole(ticket.outputs())
        finally:
            done()
        return Response(status_code=499) if body is None else JSONResponse(body)

    return router


def chat_question(asked: ChatRequest, generator: Generator) -> Question:
    """Raises `GenerationError`, `DataError` and `TokenizerError` for what can't be asked."""
    tokenizer = generator.tokenizer
    tools = asked.allowed_tools
    messages = [message.for_template() for message in asked.messages]
    prompt = generator.chat_ids(*introduced(messages, tools, tokenizer))
    lark = None
    if asked.must_call:
        lark = call_grammar(tools, tokenizer, several=not asked.one_call)
    params = asked.params(lark)
    # Templates of reasoning models open it; a form that must be kept has no room for it.
    thinking = tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK)
    if thinking and params.form is not None:
        prompt += tokenizer.encode(f"\n{THOUGHT}\n\n")
        thinking = False
    calls = calls_of(tokenizer) if tools else "none"
    form = Form(True, bool(asked.logprobs), calls, thinking, asked.one_call)
    return Question(prompt, params, form, bool(asked.stream), asked.include_usage, "messages")


def text_question(asked: CompletionRequest, generator: Generator) -> Question:
    """Raises `GenerationError` and `TokenizerError` for what can't be asked."""
    prompt = generator.ids(asked.prompt)
    return Question(
        prompt, asked.params(), Form(False), bool(asked.stream), asked.include_usage, "prompt"
    )


def _check_context(asked: Question, generator: Generator) -> None:
    if len(asked.prompt) >= generator.context:
        raise Refused(
            400,
            f"the prompt has {len(asked.prompt)} tokens, the model's context is"
            f" {generator.context}",
            param=asked.told_in,
            code="context_length_exceeded",
        )


class EventStream(StreamingResponse):
    """Server-sent events; `done` is called however they end."""

    def __init__(self, events: AsyncIterator[str], done: Any) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._done = done

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self._done()


async def _close_when_left(request: Request, ticket: Ticket) -> None:
    """Nothing is sent amid a prompt, so only asking tells that nobody waits any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.close()
