"""The routes of generations: list, read from an offset, stop, continue."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4

from fastapi import APIRouter, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from khaosz.serve.answering import Answering, EventStream, without_silence
from khaosz.serve.errors import ApiError, errors
from khaosz.serve.generations.growing import Generations, Growing
from khaosz.serve.generations.store import GenerationStore, Head, Record
from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.records.conversations import Id
from khaosz.serve.replies import (
    Called,
    CitationReply,
    LanguageWarningReply,
    Reply,
    RetrievalReply,
    TokensUsed,
    streamed,
)
from khaosz.serve.schema import ChatRequest


class GenerationRequest(ChatRequest):
    """A chat whose answer is stored. `parent`: the message of the conversation that is answered;
    `message`: the id of the answer, which is the generation's too. `stream` has no effect."""

    parent: Id
    message: Id | None = None


class Page(BaseModel):
    model_config = ConfigDict(extra="forbid")  # not strict: query parameters are text

    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: Id | None = None


class Reading(BaseModel):
    """`offset`: characters that the client has, reasoning included."""

    model_config = ConfigDict(extra="forbid")

    offset: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    stream: bool = False


class Timings(Reply):
    """Seconds: until the first token, waiting included, and from there to the last."""

    wait_seconds: float | None
    generation_seconds: float


class GenerationError(Reply):
    message: str
    code: str | None


class GenerationSummary(Reply):
    """`id`: also that of the message. `length`: characters so far, reasoning included. A generation
    that `can_continue` was stopped, interrupted by the end of the server, failed, or reached its
    token limit."""

    id: str
    object: Literal["generation"]
    conversation: str
    parent: str
    model: str
    created: int
    state: Literal["queued", "running", "complete", "stopped", "interrupted", "failed"]
    length: int
    finish_reason: (
        Literal["stop", "length", "tool_calls", "size_limit", "stopped", "interrupted", "error"]
        | None
    )
    error: GenerationError | None
    can_continue: bool
    usage: TokensUsed | None
    timings: Timings


class StoredRetrieval(RetrievalReply):
    knowledge_base: str


class Generation(GenerationSummary):
    """`reasoning` and `content` start at `offset`."""

    offset: int
    reasoning: str
    content: str
    tool_calls: list[Called] | None
    citations: list[CitationReply] | None
    not_found: bool
    retrieval: StoredRetrieval | None
    left_out: int | None
    warning: LanguageWarningReply | None


class GenerationList(Reply):
    object: Literal["list"]
    data: list[GenerationSummary]
    has_more: bool


def generation_routes(conversations: ConversationStore, answering: Answering) -> APIRouter:
    store = GenerationStore(conversations)
    generations = Generations(store, answering)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(store.interrupt_unfinished)
        yield
        await generations.close()

    router = APIRouter(lifespan=lifespan)

    @router.post(
        "/v1/conversations/{conversation:uuid}/generations",
        status_code=201,
        response_model=Generation,
        responses=errors(400, 404, 409, 503, 507),
    )
    async def create_generation(
        conversation: UUID, request: GenerationRequest, raw_request: Request
    ) -> Response:
        """Answer a message of a stored conversation. The answer is generated and stored whether a
        client reads it or not."""
        for name, value in (("n", (request.n or 1) > 1), ("logprobs", request.logprobs)):
            if value:
                raise ApiError(400, f"{name}: not stored with a generation", param=name)
        sent = await raw_request.json()
        record = Record(
            request.message or str(uuid4()),
            str(conversation),
            Head(request.parent, request.model, int(time.time())),
            resume={
                "request": {k: v for k, v in sent.items() if k not in ("parent", "message")},
                "context": None,
                # A grammar holds from the first character of a text.
                "grammar": request.params({}).form is not None or request.must_call,
            },
        )
        record = await generations.start(record, request)
        return JSONResponse(_whole(record), 201)

    @router.get(
        "/v1/conversations/{conversation:uuid}/generations",
        response_model=GenerationList,
        responses=errors(400, 404),
    )
    async def list_generations(conversation: UUID, page: Annotated[Page, Query()]) -> Response:
        """Newest first. `after`: the last id of the previous page."""
        records, more = await asyncio.to_thread(
            store.page, str(conversation), page.limit, page.after
        )
        growing = (generations.growing(each.id) for each in records)
        data = [
            _summary(grows.record if grows else each)
            for grows, each in zip(growing, records, strict=True)
        ]
        return JSONResponse({"object": "list", "data": data, "has_more": more})

    @router.get(
        "/v1/generations/{generation:uuid}",
        response_model=None,
        responses={**streamed(Generation), **errors(400, 404)},
    )
    async def read_generation(
        generation: UUID,
        reading: Annotated[Reading, Query()],
        last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,15}$")] = None,
    ) -> Response:
        """The text after `offset` characters: what there is, or with `stream`, as it grows, in
        chunks of a streamed chat. Their event ids are the offsets to continue from; `Last-Event-ID`
        is one."""
        id = str(generation)
        offset = reading.offset if reading.offset is not None else int(last_event_id or 0)
        record = await generations.record(id)
        if offset > record.tail.length:
            message = f"offset is {offset}, the generation has {record.tail.length} characters"
            raise ApiError(400, message, param="offset", code="offset_out_of_range")
        if not reading.stream:
            return JSONResponse(_whole(record, offset))
        growing = generations.growing(id) or _ended(record)
        events = without_silence(
            _events(growing, offset), answering.heartbeat, lambda: ": waiting\n\n"
        )
        return EventStream(events, "text/event-stream", lambda: None)

    @router.post(
        "/v1/generations/{generation:uuid}/stop",
        response_model=Generation,
        responses=errors(400, 404, 503, 507),
    )
    async def stop_generation(generation: UUID) -> Response:
        """Stop it and keep its text; one that has ended stays as it is."""
        return JSONResponse(_whole(await generations.stop(str(generation))))

    @router.post(
        "/v1/generations/{generation:uuid}/continue",
        response_model=Generation,
        responses=errors(400, 404, 409, 503, 507),
    )
    async def continue_generation(generation: UUID) -> Response:
        """Generate on from its last character, with the request that began it."""
        return JSONResponse(_whole(await generations.restart(str(generation))))

    return router


def _ended(record: Record) -> Growing:
    growing = Growing(record)
    growing.ended.set()
    return growing


async def _events(growing: Growing, offset: int) -> AsyncIterator[str]:
    """Chunks as of a streamed chat; an error is the last event, else `[DONE]`."""
    record = growing.record
    base = {
        "id": record.id, "object": "chat.completion.chunk", "created": record.head.created,
        "model": record.head.model,
    }  # fmt: skip

    def chunk(at: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        body = json.dumps({**base, "choices": [choice], **more}, ensure_ascii=False)
        return f"id: {at}\ndata: {body}\n\n"

    await growing.until_opened()
    if not offset:
        head = record.head
        prompt = {
            "retrieval": head.retrieval, "left_out": head.left_out, "warning": head.warning,
        }  # fmt: skip
        present: dict[str, Any] = {k: v for k, v in prompt.items() if v is not None}
        yield chunk(0, {"role": "assistant", "content": ""}, None, **present)
    async for at, kind, text in growing.texts(offset):
        offset = at
        yield chunk(at, {"content" if kind == "content" else "reasoning_content": text})
    record = growing.record
    tail = record.tail
    if growing.deleted:
        error = {"message": "generation not found", "code": "generation_deleted"}
        yield f"data: {json.dumps({'error': error})}\n\n"
        return
    last: dict[str, Any] = {}
    if tail.tool_calls:
        last["tool_calls"] = [{"index": i, **call} for i, call in enumerate(tail.tool_calls)]
    if tail.citations is not None:
        last["citations"] = tail.citations
    if tail.not_found:
        last["not_found"] = True
    more = {"usage": tail.usage, "timings": _timings(record), "can_continue": record.can_continue}
    yield chunk(offset, last, tail.finish_reason, **more)
    if tail.error is not None:
        yield f"data: {json.dumps({'error': tail.error}, ensure_ascii=False)}\n\n"
    else:
        yield "data: [DONE]\n\n"


def _timings(record: Record) -> dict[str, Any]:
    tail = record.tail
    return {"wait_seconds": tail.wait_seconds, "generation_seconds": tail.generation_seconds}


def _summary(record: Record) -> dict[str, Any]:
    head, tail = record.head, record.tail
    error = tail.error and {name: tail.error[name] for name in ("message", "code")}
    return {
        "id": record.id, "object": "generation", "conversation": record.conversation,
        "parent": head.parent, "model": head.model, "created": head.created,
        "state": record.state, "length": tail.length, "finish_reason": tail.finish_reason,
        "error": error, "can_continue": record.can_continue, "usage": tail.usage,
        "timings": _timings(record),
    }  # fmt: skip


def _whole(record: Record, offset: int = 0) -> dict[str, Any]:
    head, tail = record.head, record.tail
    reasoning, content = record.text("reasoning"), record.text("content")
    return {
        **_summary(record), "offset": offset, "reasoning": reasoning[offset:],
        "content": content[max(0, offset - len(reasoning)) :], "tool_calls": tail.tool_calls,
        "citations": tail.citations, "not_found": tail.not_found, "retrieval": head.retrieval,
        "left_out": head.left_out, "warning": head.warning,
    }  # fmt: skip
