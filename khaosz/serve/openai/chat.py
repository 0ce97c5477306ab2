"""The routes of chats and completions, whole or streamed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from khaosz.data.tokenizer.messages import text_of_parts
from khaosz.errors import ContextLengthError, KhaoszError
from khaosz.inference.generator import Generator
from khaosz.inference.parts import THOUGHT, opens_thought
from khaosz.inference.request import Output
from khaosz.inference.sampling import SamplingParams
from khaosz.rag.answer import REWRITE_TOKENS
from khaosz.serve.errors import ApiError, as_api_error, errors
from khaosz.serve.knowledge.grounding import RetrievalContext, retrieve_context
from khaosz.serve.knowledge.library import Library
from khaosz.serve.knowledge.search import searcher
from khaosz.serve.metrics import Meters
from khaosz.serve.models import Models, Use
from khaosz.serve.openai.completion_output import Answer, ResponseFormat, event
from khaosz.serve.openai.tools import add_tools, call_format, call_grammar
from khaosz.serve.openai.truncation import prompt_room, truncated
from khaosz.serve.replies import ChatCompletion, TextCompletion, streamed
from khaosz.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Prompt,
    Retrieval,
)
from khaosz.serve.worker import Busy, Failed, Ticket

_FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
_log = logging.getLogger("khaosz.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class EngineRequest:
    """A request in the engine's terms; the choices of its prompts follow one another."""

    prompts: list[list[int]]
    params: SamplingParams
    format: ResponseFormat

    @property
    def refusal(self) -> str | None:
        """The answer where a knowledge base contains none; the model is not asked."""
        context = self.format.context
        return context.refusal if context is not None and context.prompt is None else None


def chat_routes(
    models: Models,
    meters: Meters,
    timeout: float,
    library: Library | None,
    heartbeat: float,
) -> APIRouter:
    """`timeout`: seconds that a request may take, waiting included. `library`: the knowledge bases
    that a chat may use; `heartbeat`: seconds after which a silent stream sends a comment."""
    router = APIRouter()
    # A pool of their own: long prompts take no thread from other routes, and one whose client left
    # is not started.
    encoders = ThreadPoolExecutor(2, thread_name_prefix="khaosz-prompts")

    async def encode(work: Callable[[], T], field: str) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(encoders, work)
        except ContextLengthError as error:
            code = "context_length_exceeded"
            raise ApiError(400, str(error), param=field, code=code) from None

    @router.post(
        "/v1/chat/completions",
        responses={**streamed(ChatCompletion), **errors(400, 404, 409, 503, 504)},
        response_model=None,
    )
    async def chat(request: ChatRequest, raw_request: Request) -> Response:
        """Answer a conversation, as OpenAI's API does."""

        async def prepare(use: Use) -> EngineRequest:
            kept, left_out = await encode(lambda: truncated(request, use.generator), "messages")
            context = None
            if request.knowledge_base is not None:
                context = await chat_context(kept, use, library)
            prepared = await encode(lambda: chat_request(kept, use.generator, context), "messages")
            if request.truncation == "auto":
                format = replace(prepared.format, left_out=left_out)
                prepared = replace(prepared, format=format)
            return prepared

        return await answer(request, raw_request, prepare)

    @router.post(
        "/v1/completions",
        responses={**streamed(TextCompletion), **errors(400, 404, 503, 504)},
        response_model=None,
    )
    async def complete(request: CompletionRequest, raw_request: Request) -> Response:
        """Continue a text, as OpenAI's older API does."""

        async def prepare(use: Use) -> EngineRequest:
            return await encode(lambda: text_request(request, use.generator), "prompt")

        return await answer(request, raw_request, prepare)

    async def answer(
        request: ChatRequest | CompletionRequest,
        raw_request: Request,
        prepare: Callable[[Use], Awaitable[EngineRequest]],
    ) -> Response:
        models.check_capacity(request.model)
        opening = asyncio.create_task(open_answer(request, prepare))

        def leave() -> None:
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                opening.result().close()
            opening.cancel()

        watcher = asyncio.create_task(_disconnected(raw_request))
        watcher.add_done_callback(lambda _: leave())

        def done() -> None:
            watcher.cancel()  # which leaves

        with ExitStack() as undo:
            undo.callback(done)
            try:
                # Errors have a status of their own if they are found before the stream must begin.
                wait = heartbeat if request.stream else None
                await asyncio.wait({opening, watcher}, timeout=wait, return_when="FIRST_COMPLETED")
                if request.stream and not opening.done() and not watcher.done():
                    events = late_events(opening, request)
                else:
                    opened = await opening
                    events = opened.formatter.events(opened.outputs, request.include_usage)
                if request.stream:
                    undo.pop_all()  # done when it ends
                    return EventStream(with_comments(events, heartbeat), done)
                body = await opened.formatter.whole(opened.outputs)
            except asyncio.CancelledError:
                if not watcher.done():
                    raise
                body = None  # the client left
        return Response(status_code=499) if body is None else JSONResponse(body)

    async def open_answer(
        request: ChatRequest | CompletionRequest, prepare: Callable[[Use], Awaitable[EngineRequest]]
    ) -> OpenAnswer:
        """Takes the model; closing the answer gives it back."""
        use = await models.take(request.model)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        with ExitStack() as undo:
            undo.callback(models.give_back, use)
            # In a thread: encoding a long text would block the loop.
            async with asyncio.timeout_at(deadline):
                prepared = await prepare(use)
            formatter = Answer(
                prepared.format, use.name, use.generator.tokenizer, use.generator.engine.end_ids
            )
            if (refusal := prepared.refusal) is not None:
                outputs = canned_output(refusal, prepared.params.n)
                return OpenAnswer(formatter, outputs, lambda: None)
            _check_context(prepared, use.generator)
            tickets: list[Ticket] = []
            async with asyncio.timeout_at(deadline):
                for prompt in prepared.prompts:
                    tickets.append(await use.worker.submit(prompt, prepared.params, use.adapter))
                    undo.callback(tickets[-1].close)
            cleanup = undo.pop_all()
        started = time.perf_counter()
        cleanup.callback(lambda: meters.answered(use.name, formatter.usage, started))

        def expire() -> None:
            for ticket in tickets:
                ticket.expire()
            cleanup.close()  # a client that stops reading would keep its slot for ever

        timer = loop.call_at(deadline, expire)
        cleanup.callback(timer.cancel)
        outputs = tickets[0].outputs() if len(tickets) == 1 else merged_outputs(tickets)
        return OpenAnswer(formatter, outputs, cleanup.close)

    return router


@dataclass(frozen=True)
class OpenAnswer:
    """An answer that the engine generates; `close` ends it, and may be called again."""

    formatter: Answer
    outputs: AsyncIterator[Output]
    close: Callable[[], None]


async def late_events(
    opening: asyncio.Task[OpenAnswer], request: ChatRequest | CompletionRequest
) -> AsyncIterator[str]:
    """The events of an answer that is not open yet; an error becomes an event."""
    try:
        opened = await opening
    except (ApiError, KhaoszError, Busy, Failed, TimeoutError, RecursionError) as error:
        yield event(as_api_error(error).body)
        return
    except Exception as error:
        _log.exception("opening an answer failed")
        yield event(as_api_error(error).body)
        return
    async for each in opened.formatter.events(opened.outputs, request.include_usage):
        yield each


async def with_comments(events: AsyncIterator[str], seconds: float) -> AsyncIterator[str]:
    """The events, and a comment line after so many silent seconds: proxies and clients close
    silent connections, some after 50 seconds, and clients skip comments."""
    pending = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            if not (await asyncio.wait({pending}, timeout=seconds))[0]:
                yield ": waiting\n\n"
                continue
            if (each := pending.result()) is None:
                return
            yield each
            pending = asyncio.ensure_future(anext(events, None))
    finally:
        pending.cancel()


async def merged_outputs(tickets: list[Ticket]) -> AsyncIterator[Output]:
    """The outputs of several prompts as they come, choices numbered across them."""
    iterators = [ticket.outputs() for ticket in tickets]
    waiting = {asyncio.ensure_future(anext(each, None)): i for i, each in enumerate(iterators)}
    try:
        while waiting:
            for ready in (await asyncio.wait(waiting, return_when="FIRST_COMPLETED"))[0]:
                i = waiting.pop(ready)
                if (output := ready.result()) is not None:
                    yield replace(output, choice=i * tickets[i].params.n + output.choice)
                    waiting[asyncio.ensure_future(anext(iterators[i], None))] = i
    finally:
        for each in waiting:
            each.cancel()


async def canned_output(text: str, choices: int) -> AsyncIterator[Output]:
    """A fixed text as engine output."""
    for choice in range(choices):
        yield Output(0, choice, text, (), 0, 0, 0, finish_reason="stop")


async def chat_context(request: ChatRequest, use: Use, library: Library | None) -> RetrievalContext:
    """Raises `ApiError` as `retrieve_context` does, and for an unknown knowledge base."""
    assert request.knowledge_base is not None
    if library is None:
        raise ApiError(404, f"knowledge base {request.knowledge_base!r} not found")
    generator = use.generator
    tools = request.allowed_tools

    def count(messages: list[dict[str, Any]]) -> int:
        return len(generator.chat_ids(*add_tools(messages, tools, generator.tokenizer)))

    async def ask_model(messages: list[dict[str, Any]]) -> str:
        ids = await asyncio.to_thread(_prompt_without_reasoning, messages, generator)
        if len(ids) + REWRITE_TOKENS > generator.context:
            return ""
        ticket = await use.worker.submit(ids, SamplingParams(REWRITE_TOKENS, 0.0), use.adapter)
        try:
            return "".join([output.text async for output in ticket.outputs()])
        finally:
            ticket.close()

    base = await asyncio.to_thread(library.base, request.knowledge_base)
    search = await searcher(base, request.retrieval or Retrieval(), library.retrieval)
    messages = [_in_one_text(message.for_template()) for message in request.messages]
    # Where the request sets no limit, passages may use the context that an answer might.
    room = prompt_room(request.token_limit, generator)
    if request.token_limit is not None and request.truncation != "auto":
        room = generator.context - request.token_limit
    return await retrieve_context(messages, search, count, room, ask_model)


def _in_one_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": text_of_parts(content)} if isinstance(content, list) else message


def _prompt_without_reasoning(messages: list[dict[str, Any]], generator: Generator) -> list[int]:
    ids = generator.chat_ids(messages)
    return _close_reasoning(ids, generator) if _opens_reasoning(ids, generator) else ids


def _opens_reasoning(prompt: list[int], generator: Generator) -> bool:
    """Templates of reasoning models do, at the end of the prompt."""
    return opens_thought(generator.tokenizer.decode(prompt[-8:]))


def _close_reasoning(prompt: list[int], generator: Generator) -> list[int]:
    return [*prompt, *generator.tokenizer.encode(f"\n{THOUGHT}\n\n")]


def chat_request(
    request: ChatRequest, generator: Generator, context: RetrievalContext | None = None
) -> EngineRequest:
    """Raises `GenerationError`, `DataError` and `TokenizerError` for an invalid request."""
    tokenizer = generator.tokenizer
    tools = request.allowed_tools
    messages = (
        context.messages if context else [message.for_template() for message in request.messages]
    )
    prompt = generator.chat_ids(*add_tools(messages, tools, tokenizer), limit=generator.context)
    lark = None
    if request.must_call:
        lark = call_grammar(tools, tokenizer, several=not request.one_call)
    params = request.params(lark)
    reasoning = _opens_reasoning(prompt, generator)
    if reasoning and params.form is not None:  # the grammar allows no reasoning
        prompt, reasoning = _close_reasoning(prompt, generator), False
    response_format = ResponseFormat(
        chat=True,
        logprobs=bool(request.logprobs),
        calls=call_format(tokenizer) if tools else "none",
        reasoning=reasoning,
        one_call=request.one_call,
        context=context,
    )
    return EngineRequest([prompt], params, response_format)


def text_request(request: CompletionRequest, generator: Generator) -> EngineRequest:
    """Raises `GenerationError` and `TokenizerError` for an invalid request."""
    if request.suffix:
        prompts = [_gap_ids(each, request.suffix, generator) for each in request.prompts]
    else:
        prompts = [generator.ids(each, limit=generator.context) for each in request.prompts]
    return EngineRequest(prompts, request.params(), ResponseFormat(chat=False))


def _gap_ids(prompt: Prompt, suffix: str, generator: Generator) -> list[int]:
    """A prompt whose continuation fits before `suffix`: arXiv:2207.14255, in the order prefix,
    suffix, middle, with the tokens of Qwen's and StarCoder's models."""
    tokenizer = generator.tokenizer
    for names in _FILL_IN_THE_MIDDLE:
        if all(name in tokenizer.special_ids for name in names):
            before, after, middle = (tokenizer.special_ids[name] for name in names)
            limit = generator.context
            text = tokenizer.encode(prompt, limit=limit) if isinstance(prompt, str) else prompt
            return [before, *text, after, *tokenizer.encode(suffix, limit=limit), middle]
    raise ApiError(400, "suffix: this model cannot fill in a gap", param="suffix")


def _check_context(request: EngineRequest, generator: Generator) -> None:
    length = max(map(len, request.prompts))
    if length >= generator.context:
        raise ApiError(
            400,
            f"the prompt has {length} tokens, the model's context is {generator.context}",
            param="messages" if request.format.chat else "prompt",
            code="context_length_exceeded",
        )


class EventStream(StreamingResponse):
    """Server-sent events; `done` is called however they end."""

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._done = done

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self._done()


async def _disconnected(request: Request) -> None:
    """While a prompt is processed nothing is sent, so only receiving shows that the client left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
