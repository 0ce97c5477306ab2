"""The routes of answers: chats and completions, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from khaosz.inference.generator import Generator
from khaosz.inference.parts import THOUGHT, opens_thought
from khaosz.inference.request import Output
from khaosz.inference.sampling import SamplingParams
from khaosz.rag.answer import REWRITE_TOKENS
from khaosz.serve.errors import ApiError, errors
from khaosz.serve.knowledge.grounding import RetrievalContext, grounds_for
from khaosz.serve.knowledge.library import Library
from khaosz.serve.knowledge.search import searcher
from khaosz.serve.metrics import Meters
from khaosz.serve.models import Models, Use
from khaosz.serve.openai.completion_output import Answer, ResponseFormat
from khaosz.serve.openai.tools import call_grammar, calls_of, introduced
from khaosz.serve.replies import ChatCompletion, TextCompletion, streamed
from khaosz.serve.schema import ANSWER, ChatRequest, CompletionRequest, Retrieval
from khaosz.serve.worker import Ticket


@dataclass(frozen=True)
class Question:
    """A request as the engine is asked it."""

    prompt: list[int]
    params: SamplingParams
    form: ResponseFormat
    stream: bool
    include_usage: bool
    prompt_field: str  # the field that the prompt came in

    @property
    def refusal(self) -> str | None:
        """What is said where a knowledge base holds no answer."""
        grounds = self.form.grounds
        return grounds.refusal if grounds is not None and grounds.prompt is None else None


def chat_routes(
    models: Models, meters: Meters, timeout: float, library: Library | None
) -> APIRouter:
    """`timeout`: seconds that a request may take, waiting included. `library`: the knowledge bases
    that a chat may be about."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses={**streamed(ChatCompletion), **errors(400, 404, 409, 503, 504)},
        response_model=None,
    )
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation, as OpenAI's API does."""
        models.check_room(asked.model)
        use = await models.take(asked.model)

        async def question() -> Question:
            grounds = None
            if asked.knowledge_base is not None:
                grounds = await grounded(asked, use, library)
            return await asyncio.to_thread(chat_question, asked, use.generator, grounds)

        return await answered(use, request, question)

    @router.post(
        "/v1/completions",
        responses={**streamed(TextCompletion), **errors(400, 404, 503, 504)},
        response_model=None,
    )
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Continue a text, as OpenAI's older API does."""
        models.check_room(asked.model)
        use = await models.take(asked.model)

        async def question() -> Question:
            return await asyncio.to_thread(text_question, asked, use.generator)

        return await answered(use, request, question)

    async def answered(
        use: Use, request: Request, question: Callable[[], Awaitable[Question]]
    ) -> Response:
        """Gives the model back, however it ends."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        with ExitStack() as undo:
            undo.callback(models.give_back, use)
            # Beside the loop and the engine: a long text takes a while.
            async with asyncio.timeout_at(end):
                asked = await question()
            refusal = asked.refusal
            if refusal is not None:
                return await refused(use, asked, refusal)
            _check_context(asked, use.generator)
            async with asyncio.timeout_at(end):
                ticket = await use.worker.submit(asked.prompt, asked.params, use.adapter)
            undo.callback(ticket.close)
            held = undo.pop_all()
        answer = answer_of(use, asked)
        began = time.perf_counter()
        held.callback(lambda: meters.answered(use.name, answer.usage, began))
        watch = asyncio.create_task(_close_when_left(request, ticket))
        held.callback(watch.cancel)

        def too_late() -> None:
            ticket.expire()
            held.close()  # a client that reads no more would keep its place for ever

        limit = loop.call_at(end, too_late)
        held.callback(limit.cancel)
        if asked.stream:
            return EventStream(answer.events(ticket.outputs(), asked.include_usage), held.close)
        try:
            body = await answer.whole(ticket.outputs())
        finally:
            held.close()
        return Response(status_code=499) if body is None else JSONResponse(body)

    async def refused(use: Use, asked: Question, text: str) -> Response:
        """Nothing was found to answer from, and no model is asked."""
        answer = answer_of(use, asked)
        outputs = canned_output(text, asked.params.n)
        if asked.stream:
            return EventStream(answer.events(outputs, asked.include_usage), lambda: None)
        return JSONResponse(await answer.whole(outputs))

    return router


def answer_of(use: Use, asked: Question) -> Answer:
    return Answer(asked.form, use.name, use.generator.tokenizer, use.generator.engine.end_ids)


async def canned_output(text: str, choices: int) -> AsyncIterator[Output]:
    """A text that no model has written, as if one had."""
    for choice in range(choices):
        yield Output(0, choice, text, (), 0, 0, 0, finish_reason="stop")


async def grounded(asked: ChatRequest, use: Use, library: Library | None) -> RetrievalContext:
    """Raises `ApiError` as `grounds_for` does, and for a base that there isn't."""
    if library is None:
        raise ApiError(404, f"there is no knowledge base {asked.knowledge_base!r}")
    assert asked.knowledge_base is not None
    generator = use.generator
    tools = asked.allowed_tools

    def count(messages: list[dict[str, Any]]) -> int:
        return len(generator.chat_ids(*introduced(messages, tools, generator.tokenizer)))

    async def ask_model(messages: list[dict[str, Any]]) -> str:
        ids = await asyncio.to_thread(_unthinking, messages, generator)
        if len(ids) + REWRITE_TOKENS > generator.context:
            return ""
        ticket = await use.worker.submit(ids, SamplingParams(REWRITE_TOKENS, 0.0), use.adapter)
        try:
            return "".join([output.text async for output in ticket.outputs()])
        finally:
            ticket.close()

    _, base = await asyncio.to_thread(library.base, asked.knowledge_base)
    search = await searcher(base, asked.retrieval or Retrieval(), library.retrieval)
    messages = [message.for_template() for message in asked.messages]
    # Where no length is asked for, what the model could still say is not taken from its passages.
    answer = asked.most_tokens or min(ANSWER, generator.context // 4)
    return await grounds_for(messages, search, count, generator.context - answer, ask_model)


def _unthinking(messages: list[dict[str, Any]], generator: Generator) -> list[int]:
    """A prompt whose answer begins with no thoughts."""
    ids = generator.chat_ids(messages)
    return _closed(ids, generator) if _thinks(ids, generator) else ids


def _thinks(prompt: list[int], generator: Generator) -> bool:
    """Templates of reasoning models open it."""
    return opens_thought(generator.tokenizer.decode(prompt[-8:]))


def _closed(prompt: list[int], generator: Generator) -> list[int]:
    return [*prompt, *generator.tokenizer.encode(f"\n{THOUGHT}\n\n")]


def chat_question(
    asked: ChatRequest, generator: Generator, grounds: RetrievalContext | None = None
) -> Question:
    """Raises `GenerationError`, `DataError` and `TokenizerError` for what can't be asked."""
    tokenizer = generator.tokenizer
    tools = asked.allowed_tools
    messages = (
        grounds.messages if grounds else [message.for_template() for message in asked.messages]
    )
    prompt = generator.chat_ids(*introduced(messages, tools, tokenizer))
    lark = None
    if asked.must_call:
        lark = call_grammar(tools, tokenizer, several=not asked.one_call)
    params = asked.params(lark)
    thinking = _thinks(prompt, generator)
    if thinking and params.form is not None:  # which has no room for thoughts
        prompt, thinking = _closed(prompt, generator), False
    calls = calls_of(tokenizer) if tools else "none"
    form = ResponseFormat(True, bool(asked.logprobs), calls, thinking, asked.one_call, grounds)
    return Question(prompt, params, form, bool(asked.stream), asked.include_usage, "messages")


def text_question(asked: CompletionRequest, generator: Generator) -> Question:
    """Raises `GenerationError` and `TokenizerError` for what can't be asked."""
    prompt = generator.ids(asked.prompt)
    return Question(
        prompt,
        asked.params(),
        ResponseFormat(False),
        bool(asked.stream),
        asked.include_usage,
        "prompt",
    )


def _check_context(asked: Question, generator: Generator) -> None:
    if len(asked.prompt) >= generator.context:
        raise ApiError(
            400,
            f"the prompt has {len(asked.prompt)} tokens, the model's context is"
            f" {generator.context}",
            param=asked.prompt_field,
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
