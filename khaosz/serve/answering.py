"""The core of all protocols: an answer of a model's engine is opened, and sent whole or streamed.

A protocol translates its request into a `ChatRequest` or a `CompletionRequest`, and has a `Layout`
that translates the pieces of the answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.messages import text_of_parts
from khaosz.errors import ContextLengthError, KhaoszError
from khaosz.inference.generator import Generator
from khaosz.inference.parts import Part, PartStream, ToolCall
from khaosz.inference.request import Logprob, Output
from khaosz.interop.languages import language_warning
from khaosz.rag.answer import CitationStream
from khaosz.rag.prompt import is_refusal
from khaosz.serve.errors import ApiError, as_api_error
from khaosz.serve.knowledge.grounding import RetrievalContext, StoredContext
from khaosz.serve.knowledge.library import Library
from khaosz.serve.metrics import Meters, Usage
from khaosz.serve.models import Models, Use
from khaosz.serve.prompts import (
    COUNTED,
    Continued,
    EngineRequest,
    ResponseFormat,
    chat_context,
    chat_request,
    text_request,
)
from khaosz.serve.schema import ChatRequest, CompletionRequest
from khaosz.serve.truncation import truncated
from khaosz.serve.worker import Busy, Failed, Stopping, Ticket

T = TypeVar("T")
AnyRequest = ChatRequest | CompletionRequest
_log = logging.getLogger("khaosz.serve")


@dataclass(frozen=True)
class Piece:
    """What became final of one choice. `reason`, in its last piece: "stop", "length" or
    "tool_calls"; `stop`: the stop string that ended it; `text`: as the model wrote it."""

    choice: int
    parts: list[Part | ToolCall]
    logprobs: list[Logprob]
    reason: str | None
    stop: str | None = None
    text: str = ""


class Choice:
    """One choice of an answer: the text of outputs in, parts out."""

    def __init__(self, format: ResponseFormat) -> None:
        self._format = format
        self._parts = None
        if format.chat:
            self._parts = PartStream(format.calls, thinking=format.reasoning, tools=format.tools)
        context = format.context
        self._citations = CitationStream(len(context.passages)) if context else None
        self.calls = 0
        self.beginning = ""  # of the text: enough to tell a refusal

    def replay(self, text: str) -> list[Part | ToolCall]:
        """The parts of the text that the answer continues."""
        assert self._parts is not None
        return [each for part in self._parts.feed(text) for each in self._part(part)]

    def take(self, output: Output) -> tuple[list[Part | ToolCall], str | None]:
        """Parts, and why the choice ended."""
        reason = output.finish_reason
        if self._parts is None:
            return ([Part("content", output.text)] if output.text else []), reason
        parts = self._parts.feed(output.text)
        if reason is not None:
            parts += self._parts.finish(cut=reason != "stop" or output.stop is not None)
        taken = [each for part in parts for each in self._part(part)]
        if reason is not None:
            taken += self._held_back()
        if self._citations is not None and len(self.beginning) < 500:
            self.beginning += "".join(
                each.text for each in taken if isinstance(each, Part) and each.kind == "content"
            )
        return taken, "tool_calls" if self.calls and reason == "stop" else reason

    def _part(self, part: Part | ToolCall) -> list[Part | ToolCall]:
        if isinstance(part, ToolCall):
            if self.calls and self._format.one_call:
                return []
            self.calls += 1
            return [*self._held_back(), part]
        if part.kind == "reasoning":
            return [part] if self._format.show_reasoning else []
        text = self._citations.feed(part.text) if self._citations else part.text
        return [Part("content", text)] if text else []

    def _held_back(self) -> list[Part | ToolCall]:
        """Text that was held back because it might have become a citation."""
        text = self._citations.finish() if self._citations else ""
        return [Part("content", text)] if text else []

    @property
    def cited(self) -> list[int]:
        return self._citations.used if self._citations else []


@dataclass(frozen=True)
class Times:
    """Of an answer, by `time.perf_counter`: its request's arrival, its model's loading, and when
    the engine got the prompt."""

    arrived: float
    loaded: float
    started: float


@dataclass
class Answer:
    """An open answer. `prompt_tokens`: of all its prompts; `ends`: tokens that end a turn."""

    format: ResponseFormat
    model: str
    tokenizer: Tokenizer
    ends: set[int]
    outputs: AsyncIterator[Output]
    prompt_tokens: int = 0
    times: Times = Times(0.0, 0.0, 0.0)
    usage: Usage = field(default_factory=Usage)
    close: Callable[[], None] = lambda: None  # ends it, and may be called again
    created: int = field(default_factory=lambda: int(time.time()))
    _choices: dict[int, Choice] = field(default_factory=dict)

    def continued(self) -> list[Part | ToolCall]:
        """The parts of the answer that this one continues; to be called before `pieces`."""
        choice = self._choices[0] = Choice(self.format)
        return choice.replay(self.format.continued.text) if self.format.continued else []

    async def pieces(self) -> AsyncIterator[Piece]:
        """They end early when the client leaves. Raises as `Ticket.outputs` does."""
        async for output in self.outputs:
            self.usage.count(output)
            choice = self._choices.setdefault(output.choice, Choice(self.format))
            parts, reason = choice.take(output)
            # The token that ends the turn is not part of the text.
            logprobs = [each for each in output.logprobs if each.token not in self.ends]
            yield Piece(output.choice, parts, logprobs, reason, output.stop, output.text)

    async def collected(self) -> dict[int, Piece] | None:
        """One piece of each choice; None if the client left before the end."""
        whole: dict[int, Piece] = {}
        async for piece in self.pieces():
            if piece.choice in whole:
                before = whole[piece.choice]
                logprobs = [*before.logprobs, *piece.logprobs]
                piece = replace(piece, parts=[*before.parts, *piece.parts], logprobs=logprobs)
            whole[piece.choice] = piece
        ended = whole and all(piece.reason is not None for piece in whole.values())
        return dict(sorted(whole.items())) if ended else None

    def citations(self, choice: int) -> dict[str, Any]:
        """The field `citations` of a choice that has ended, and `not_found` if it says that the
        documents don't contain the answer; empty without a knowledge base."""
        if self.format.context is None or choice not in self._choices:
            return {}
        ended = self._choices[choice]
        fields: dict[str, Any] = {"citations": self.format.context.citations(ended.cited)}
        return {**fields, "not_found": True} if is_refusal(ended.beginning) else fields

    def prompt_fields(self) -> dict[str, Any]:
        """What the model got in its prompt, and what it did not: `retrieval` with a knowledge base,
        `left_out` with `truncation: auto`; and a `warning`."""
        context, left_out = self.format.context, self.format.left_out
        fields: dict[str, Any] = {"retrieval": context.body()} if context else {}
        if self.format.warning is not None:
            fields["warning"] = self.format.warning
        return fields if left_out is None else {**fields, "left_out": left_out}

    def token(self, token: int, value: float) -> dict[str, Any]:
        """A token and its log-probability."""
        # The rows that pad a vocabulary have -inf, which JSON lacks.
        raw = self.tokenizer.token_bytes(token)
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": max(value, -9999.0), "bytes": list(raw)}

    def logprobs(self, values: Iterable[Logprob]) -> list[dict[str, Any]]:
        return [
            {
                **self.token(each.token, each.value),
                "top_logprobs": [self.token(*pair) for pair in each.top],
            }
            for each in values
        ]


class Layout(Protocol):
    """How a protocol writes one answer."""

    media_type: str

    def waiting(self) -> str:
        """What a stream sends that would otherwise be silent."""

    async def whole(self, answer: Answer) -> dict[str, Any] | None:
        """The complete answer; None if the client left before."""

    def events(self, answer: Answer) -> AsyncIterator[str]:
        """The stream. Raises as `Answer.pieces` does."""

    def failed(self, error: ApiError) -> str:
        """The last event of a stream that fails."""


class Answering:
    """Answers requests with the models' engines."""

    def __init__(
        self,
        models: Models,
        meters: Meters,
        timeout: float,
        library: Library | None,
        heartbeat: float,
    ) -> None:
        """`timeout`: seconds that a request may take, waiting included. `library`: the knowledge
        bases that a chat may use; `heartbeat`: seconds after which a silent stream sends a
        comment."""
        self.models, self._meters = models, meters
        self._timeout, self._library, self.heartbeat = timeout, library, heartbeat
        # A pool of their own: long prompts take no thread from other routes, and one whose client
        # left is not started.
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="khaosz-prompts")

    async def chat(
        self,
        request: ChatRequest,
        raw_request: Request,
        layout: Layout,
        *,
        prefill: str = "",
    ) -> Response:
        """Answer a conversation. `prefill` as for `chat_request`."""

        prepare = partial(self._prepare, request, prefill=prefill)
        return await self._send(request, raw_request, layout, prepare)

    async def open_chat(self, request: ChatRequest, continued: Continued | None = None) -> Answer:
        """An answer that is not sent to a client; `continued`: the one that it continues. The
        caller must close it. Raises as a chat does."""
        return await self._open(request.model, partial(self._prepare, request, continued=continued))

    async def _prepare(
        self,
        request: ChatRequest,
        use: Use,
        *,
        prefill: str = "",
        continued: Continued | None = None,
    ) -> EngineRequest:
        kept, left_out = await self.in_encoder(
            lambda: truncated(request, use.generator), "messages"
        )
        context: RetrievalContext | StoredContext | None = None
        if continued is not None and continued.context is not None:
            context = StoredContext(**continued.context)
        elif request.knowledge_base is not None:
            context = await chat_context(kept, use, self._library)

        def encode() -> EngineRequest:
            return chat_request(kept, use.generator, context, prefill=prefill, continued=continued)

        prepared = await self.in_encoder(encode, "messages")
        if (warning := self._language_warning(request)) is not None:
            prepared = replace(prepared, format=replace(prepared.format, warning=warning))
        if request.truncation == "auto":
            format = replace(prepared.format, left_out=left_out)
            prepared = replace(prepared, format=format)
        return prepared

    def _language_warning(self, request: ChatRequest) -> dict[str, str] | None:
        """At the first message in a language that the model is known to lack."""
        texts = [
            text_of_parts(message.for_template().get("content"))
            for message in request.messages
            if message.role == "user"
        ]
        known = self.models.find(request.model).languages
        if not texts or known is None:
            return None
        warning = language_warning(texts[-1], known, request.model, texts[:-1])
        return None if warning is None else warning.body()

    async def complete(
        self, request: CompletionRequest, raw_request: Request, layout: Layout
    ) -> Response:
        """Continue a text."""

        async def prepare(use: Use) -> EngineRequest:
            return await self.in_encoder(lambda: text_request(request, use.generator), "prompt")

        return await self._send(request, raw_request, layout, prepare)

    async def count(self, request: ChatRequest, *, prefill: str = "") -> int:
        """Tokens of a prompt, which may not fit into the context. Raises as `chat_request` does."""
        use = await self.models.take(request.model)

        def encode() -> EngineRequest:
            limit = COUNTED * use.generator.context
            return chat_request(request, use.generator, prefill=prefill, limit=limit)

        try:
            encoded = await self.in_encoder(encode, "messages")
        finally:
            self.models.give_back(use)
        return len(encoded.prompts[0])

    async def in_encoder(self, work: Callable[[], T], field: str) -> T:
        """Run `work`, which encodes a field of the request. Raises `ApiError` if it is too long."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoders, work)
        except ContextLengthError as error:
            code = "context_length_exceeded"
            raise ApiError(400, str(error), param=field, code=code) from None

    async def _send(
        self,
        request: AnyRequest,
        raw_request: Request,
        layout: Layout,
        prepare: Callable[[Use], Awaitable[EngineRequest]],
    ) -> Response:
        self.models.check_capacity(request.model)
        opening = asyncio.create_task(self._open(request.model, prepare))

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
                wait = self.heartbeat if request.stream else None
                await asyncio.wait({opening, watcher}, timeout=wait, return_when="FIRST_COMPLETED")
                if request.stream:
                    if opening.done() or watcher.done():
                        await opening
                    path = raw_request.url.path
                    events = stream_events(opening, layout, path)
                    undo.pop_all()  # done when it ends
                    sent = without_silence(events, self.heartbeat, layout.waiting)
                    return EventStream(sent, layout.media_type, done)
                body = await layout.whole(await opening)
            except asyncio.CancelledError:
                if not watcher.done():
                    raise
                body = None  # the client left
        return Response(status_code=499) if body is None else JSONResponse(body)

    async def _open(self, model: str, prepare: Callable[[Use], Awaitable[EngineRequest]]) -> Answer:
        """Takes the model; closing the answer gives it back."""
        arrived = time.perf_counter()
        use = await self.models.take(model)
        loaded = time.perf_counter()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        with ExitStack() as undo:
            undo.callback(self.models.give_back, use)
            # In a thread: encoding a long text would block the loop.
            async with asyncio.timeout_at(deadline):
                prepared = await prepare(use)
            generator = use.generator
            made = prepared.format, use.name, generator.tokenizer, generator.engine.end_ids
            if (refusal := prepared.refusal) is not None:
                times = Times(arrived, loaded, time.perf_counter())
                return Answer(*made, canned_output(refusal, prepared.params.n), times=times)
            _check_context(prepared, generator)
            tickets: list[Ticket] = []
            async with asyncio.timeout_at(deadline):
                for prompt in prepared.prompts:
                    tickets.append(await use.worker.submit(prompt, prepared.params, use.adapter))
                    undo.callback(tickets[-1].close)
            cleanup = undo.pop_all()
        times = Times(arrived, loaded, time.perf_counter())
        outputs = tickets[0].outputs() if len(tickets) == 1 else merged_outputs(tickets)
        tokens = sum(map(len, prepared.prompts))
        answer = Answer(*made, outputs, tokens, times, close=cleanup.close)
        cleanup.callback(lambda: self._meters.answered(use.name, answer.usage, times.started))

        def expire() -> None:
            for ticket in tickets:
                ticket.expire()
            cleanup.close()  # a client that stops reading would keep its slot for ever

        timer = loop.call_at(deadline, expire)
        cleanup.callback(timer.cancel)
        return answer


async def stream_events(
    opening: asyncio.Task[Answer], layout: Layout, path: str
) -> AsyncIterator[str]:
    """The events of an answer that may not be open yet; an error becomes an event."""
    try:
        answer = await opening
    except (ApiError, KhaoszError, Busy, Failed, TimeoutError, RecursionError) as error:
        yield layout.failed(as_api_error(error, path))
        return
    except Exception as error:
        _log.exception("opening an answer failed")
        yield layout.failed(as_api_error(error, path))
        return
    try:
        async for each in layout.events(answer):
            yield each
    except (TimeoutError, Stopping) as error:
        yield layout.failed(as_api_error(error, path))
    except Failed:
        yield layout.failed(ApiError(500, "the answer failed"))
    except KhaoszError as error:
        yield layout.failed(ApiError(500, str(error)))


async def without_silence(
    events: AsyncIterator[str], seconds: float, waiting: Callable[[], str]
) -> AsyncIterator[str]:
    """The events, and `waiting` after so many silent seconds: proxies and clients close silent
    connections, some after 50 seconds."""
    pending = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            if not (await asyncio.wait({pending}, timeout=seconds))[0]:
                yield waiting()
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


def _check_context(request: EngineRequest, generator: Generator) -> None:
    length = max(map(len, request.prompts))
    if length >= generator.context:
        raise ApiError(
            400,
            generator.engine.too_long(length),
            param="messages" if request.format.chat else "prompt",
            code="context_length_exceeded",
        )


class EventStream(StreamingResponse):
    """A streamed answer; `done` is called however it ends."""

    def __init__(
        self, events: AsyncIterator[str], media_type: str, done: Callable[[], None]
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type=media_type, headers=headers)
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
