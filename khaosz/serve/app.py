"""The routes: OpenAI's paths over one engine thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from khaosz.inference.generator import Generator
from khaosz.serve.answers import Answer
from khaosz.serve.refusals import Refused, explain_errors
from khaosz.serve.schema import ChatRequest, CompletionRequest
from khaosz.serve.worker import EngineThread, Ticket


def build_app(
    generator: Generator, name: str, *, max_queue: int, routers: Sequence[APIRouter] = ()
) -> FastAPI:
    """The service of one model under one name; it starts and stops the engine's thread. `routers`:
    what is served beside the model."""
    worker = EngineThread(generator.engine, max_queue)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    # No /docs: that page loads its scripts from another host.
    app = FastAPI(title="KHAOSZ", docs_url=None, redoc_url=None, lifespan=lifespan)
    explain_errors(app)
    for router in routers:
        app.include_router(router)

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
