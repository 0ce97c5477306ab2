"""The routes: OpenAI's paths over one engine thread."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from khaosz.errors import DataError, GenerationError, KhaoszError, TokenizerError
from khaosz.inference.generator import Generator
from khaosz.serve.answers import Answer, error_body
from khaosz.serve.schema import ChatRequest, CompletionRequest
from khaosz.serve.worker import Busy, EngineThread, Failed, Ticket

RETRY_AFTER = 1  # seconds, when the queue is full


class Refused(Exception):
    """A request that ends with an error of OpenAI's layout."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, param, code)


def build_app(generator: Generator, name: str, *, max_queue: int) -> FastAPI:
    """The service of one model under one name; it starts and stops the engine's thread."""
    worker = EngineThread(generator.engine, max_queue)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    # No /docs: that page loads its scripts from another host.
    app = FastAPI(title="KHAOSZ", docs_url=None, redoc_url=None, lifespan=lifespan)
    _explain_errors(app)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        check_model(asked.model)
        worker.check_room()
        messages = [message.for_template() for message in asked.messages]
        # Beside the loop and the engine: a long text takes a while.
        prompt = await asyncio.to_thread(generator.chat_ids, messages)
        return await answer(asked, prompt, request, chat=True, logprobs=bool(asked.logprobs))

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        check_model(asked.model)
        worker.check_room()
        prompt = await asyncio.to_thread(generator.ids, asked.prompt)
        return await answer(asked, prompt, request, chat=False, logprobs=False)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return model_card()

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> dict[str, Any]:
        if not worker.alive:
            raise Refused(503, "the engine has ended", "server_error")
        return {"status": "ready", "requests": worker.held, "max_queue": worker.max_queue}

    def model_card() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "khaosz"}

    def check_model(asked: str) -> None:
        if asked != name:
            raise Refused(
                404,
                f"the model {asked!r} does not exist; this server has {name!r}",
                param="model",
                code="model_not_found",
            )

    async def answer(
        asked: ChatRequest | CompletionRequest,
        prompt: list[int],
        request: Request,
        *,
        chat: bool,
        logprobs: bool,
    ) -> Response:
        if len(prompt) >= generator.context:
            raise Refused(
                400,
                f"the prompt has {len(prompt)} tokens, the model's context is {generator.context}",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
        ticket = await worker.submit(prompt, asked.params())
        watch = asyncio.create_task(_close_when_left(request, ticket))
        given = Answer(chat, name, generator.tokenizer, generator.engine.end_ids, logprobs)
        if asked.stream:
            events = given.events(ticket.outputs(), asked.include_usage)
            return EventStream(events, ticket, watch)
        try:
            body = await given.whole(ticket.outputs())
        finally:
            ticket.close()
            watch.cancel()
        return Response(status_code=499) if body is None else JSONResponse(body)

    return app


class EventStream(StreamingResponse):
    """Server-sent events of a ticket, which it closes however it ends."""

    def __init__(
        self, events: AsyncIterator[str], ticket: Ticket, watch: asyncio.Task[None]
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._ticket, self._watch = ticket, watch

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self._ticket.close()
            self._watch.cancel()


async def _close_when_left(request: Request, ticket: Ticket) -> None:
    """Nothing is sent amid a prompt, so only asking tells that nobody waits any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.close()


def _explain_errors(app: FastAPI) -> None:
    def refused(
        status: int,
        body: dict[str, Any],
        headers: dict[str, str] | None = None,
    ) -> Response:
        # ASCII: what a client sent and a message repeats may not be valid Unicode.
        return Response(json.dumps(body), status, headers, "application/json")

    @app.exception_handler(Refused)
    async def our_own(request: Request, error: Refused) -> Response:
        return refused(error.status, error.body)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        body = error_body("the queue is full", "server_error", code="queue_full")
        return refused(503, body, {"retry-after": str(RETRY_AFTER)})

    @app.exception_handler(KhaoszError)
    async def out_of_range(request: Request, error: KhaoszError) -> Response:
        if not isinstance(error, GenerationError | DataError | TokenizerError):
            return refused(500, error_body("the request failed", "server_error"))
        # `SamplingParams` begins with the name of what is out of range.
        word = str(error).partition(" ")[0]
        field = "response_format" if word == "json_schema" else word
        param = field if field in ChatRequest.model_fields else None
        return refused(400, error_body(str(error), "invalid_request_error", param))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The deepest: of a union, that is the member that fits best.
        first = max(error.errors(), key=lambda each: len(each["loc"]))
        unknown = first["type"] == "extra_forbidden"
        what = "unknown field" if unknown else str(first["msg"])
        param = _path(first["loc"][1:], unknown)
        message = what.removeprefix("Value error, ")
        message = f"{param}: {message}" if param else message
        return refused(400, error_body(message, "invalid_request_error", param))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return refused(
            error.status_code, error_body(str(error.detail), "invalid_request_error"), headers
        )

    @app.exception_handler(Failed)
    async def failed(request: Request, error: Failed) -> Response:
        return refused(500, error_body("the request failed", "server_error"))

    @app.exception_handler(Exception)
    async def surprise(request: Request, error: Exception) -> Response:
        return refused(500, error_body("the request failed", "server_error"))


def _path(parts: Sequence[str | int], unknown: bool) -> str | None:
    """Where a field stands. Of a union pydantic also names the member that it tried, by its type;
    an unknown field may be called like one."""
    last = len(parts) - 1
    kept = [
        str(part)
        for at, part in enumerate(parts)
        if (unknown and at == last) or not (part == "str" or str(part).startswith("list["))
    ]
    return ".".join(kept) or None
