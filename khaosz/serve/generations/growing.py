"""Generations while they grow: generated without a client, stored twice a second, and read by any
number of clients at once."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from khaosz.errors import KhaoszError
from khaosz.inference.parts import Part, ToolCall
from khaosz.serve.answering import Answer, Answering, Piece
from khaosz.serve.errors import ApiError, as_api_error
from khaosz.serve.generations.store import GenerationStore, Growth, Kind, Record, State, merged
from khaosz.serve.prompts import Continued
from khaosz.serve.records.conversations import MAX_NODES
from khaosz.serve.schema import ChatRequest
from khaosz.serve.worker import Busy, Failed, Stopping

MAX_BYTES = 1 << 20  # of an answer as UTF-8, with its reasoning, calls and passages
MAX_RUNNING = 64  # at a time
STORE_SECONDS = 0.5  # a crash loses at most what was generated since
_log = logging.getLogger("khaosz.serve")


class Growing:
    """One generation, for one event loop. `ended`: it is stored, or will be when that is possible
    again."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.ended = asyncio.Event()
        self.end: Literal["stopped", "interrupted"] | None = None  # why it is cancelled
        self.full = self.opened = self.deleted = False
        self.reason: str | None = None
        self.usage = record.tail.usage
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        # How much of the record is stored: parts, raw texts, and whether what does not grow is.
        self._stored = len(record.parts), len(record.raw), False
        self._size = sum(len(text.encode()) for _, text in record.parts)
        self._started = time.perf_counter()
        self._first: float | None = None
        self._seconds = record.tail.generation_seconds

    # ---------------------------------------------------------------------------------------- grow

    def open(self, answer: Answer) -> None:
        """The answer's prompt is known."""
        record = self.record
        record.head.left_out = answer.format.left_out
        record.head.warning = answer.format.warning
        context = answer.format.context
        if record.resume is not None and context is not None:
            record.head.retrieval = {
                **context.body(), "knowledge_base": record.resume["request"]["knowledge_base"],
            }  # fmt: skip
            record.resume["context"] = context.stored()
            self._size += len(json.dumps(record.head.retrieval))
        if record.raw:
            # What was held back, as it might have become a marker, comes with what follows.
            record.parts, record.tail.length, self._size = [], 0, 0
            self._add_all(answer.continued())
        self.opened = True
        self.wake()

    def take(self, piece: Piece) -> None:
        """Add what was generated."""
        if self._first is None:
            self._first = time.perf_counter()
            self.record.state = "running"
        self.record.raw.append(piece.text)
        self._add_all(piece.parts)
        self.reason = piece.reason
        self.wake()

    def _add_all(self, parts: Sequence[Part | ToolCall]) -> None:
        for part in parts:
            if isinstance(part, ToolCall):
                self._add_call(part)
            else:
                self._add(part.kind, part.text)

    def _add(self, kind: Kind, text: str) -> None:
        data = text.encode()
        if self._size + len(data) > MAX_BYTES:
            self.full = True
            data = data[: max(0, MAX_BYTES - self._size)]
            text = data.decode(errors="ignore")
        self._size += len(data)
        if text:
            self.record.parts.append((kind, text))
            self.record.tail.length += len(text)

    def _add_call(self, call: ToolCall) -> None:
        body = call.body()
        self._size += len(json.dumps(body))
        if self._size > MAX_BYTES:
            self.full = True
        else:
            self.record.tail.tool_calls = [*(self.record.tail.tool_calls or ()), body]

    def count(self, answer: Answer) -> None:
        """Usage and times so far; a continued answer counts all its tokens."""
        tail, now = self.record.tail, time.perf_counter()
        usage = answer.usage.body()
        if self.usage is not None:
            usage["completion_tokens"] += self.usage["completion_tokens"]
            usage["total_tokens"] += self.usage["completion_tokens"]
        tail.usage = usage
        if self._first is not None:
            tail.wait_seconds = round(self._first - self._started, 3)
            tail.generation_seconds = round(self._seconds + now - self._first, 3)

    def finished(self, state: State, reason: str, error: dict[str, Any] | None = None) -> Record:
        """The record at its end; `record` stays as it is until that is stored."""
        tail = replace(self.record.tail, finish_reason=reason, error=error)
        final = replace(self.record, state=state, tail=tail, parts=merged(self.record.parts))
        if state == "complete" and reason != "length":
            final.resume = None  # nothing follows
        return final

    def cancel(self, end: Literal["stopped", "interrupted"]) -> None:
        """Stop generating; `end` is the state that it gets."""
        if self.end is None and self.task is not None:
            self.end = end
            self.task.cancel()

    def wake(self) -> None:
        """Its readers look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    # --------------------------------------------------------------------------------------- store

    def growth(self) -> Growth:
        """What is not stored yet, as it is now: it is stored in another thread."""
        parts, raw, opened = self._stored
        record = replace(
            self.record, head=replace(self.record.head), tail=replace(self.record.tail),
            parts=self.record.parts[parts:], raw=self.record.raw[raw:],
        )  # fmt: skip
        return Growth(record, raw, self.opened and not opened)

    def mark_stored(self, growth: Growth) -> None:
        parts, raw, opened = self._stored
        more = growth.record
        self._stored = parts + len(more.parts), raw + len(more.raw), opened or growth.opened

    # ---------------------------------------------------------------------------------------- read

    async def texts(self, offset: int) -> AsyncIterator[tuple[int, Kind, str]]:
        """The text after `offset` characters as it grows: where each piece ends, and the piece."""
        parts, at, index = self.record.parts, 0, 0
        while True:
            changed = self._changed
            if parts is not self.record.parts:  # merged, when it ended
                parts, at, index = self.record.parts, 0, 0
            ready: list[tuple[Kind, str]] = []
            for kind, text in parts[index:]:
                if at + len(text) > offset:
                    ready.append((kind, text[max(0, offset - at) :]))
                at += len(text)
            index = len(parts)
            for kind, text in merged(ready):
                offset += len(text)
                yield offset, kind, text
            if self.ended.is_set():
                return
            await changed.wait()

    async def until_opened(self) -> None:
        while not (self.opened or self.ended.is_set()):
            await self._changed.wait()


def _explained(error: Exception) -> dict[str, Any]:
    body: dict[str, Any] = as_api_error(error, "/v1/generations").body["error"]
    return body


class Generations:
    """All generations of a service; for one event loop."""

    def __init__(self, store: GenerationStore, answering: Answering) -> None:
        self.store, self._answering = store, answering
        self._growing: dict[str, Growing] = {}
        self._writes = asyncio.Lock()  # one at a time, in order
        self._tasks: set[asyncio.Task[None]] = set()
        self._storing: asyncio.Task[None] | None = None

    def growing(self, id: str) -> Growing | None:
        return self._growing.get(id)

    async def record(self, id: str) -> Record:
        """Raises `ApiError` if it does not exist."""
        growing = self._growing.get(id)
        return growing.record if growing else await asyncio.to_thread(self.store.get, id)

    async def start(self, record: Record, request: ChatRequest) -> Record:
        """Store a new generation and begin to generate it. Raises `ApiError` and `Busy`."""
        self._check_capacity(request)
        async with self._writes:
            await asyncio.to_thread(self.store.create, record, MAX_NODES)
            self._run(record, request, None)
        return record

    async def restart(self, id: str) -> Record:
        """Continue one that was stopped or interrupted, failed, or reached its length. Raises
        `ApiError` and `Busy`."""
        record = await self.record(id)
        if record.resume is not None:
            self._check_capacity(ChatRequest.model_validate(record.resume["request"]))
        async with self._writes:
            record = await asyncio.to_thread(self.store.restart, id)
            assert record.resume is not None
            request = ChatRequest.model_validate(record.resume["request"])
            raw = "".join(record.raw)
            self._run(record, request, Continued(raw, record.resume["context"]) if raw else None)
        return record

    async def stop(self, id: str) -> Record:
        """Stop it and wait until it is stored; does nothing if it has ended."""
        if growing := self._growing.get(id):
            growing.cancel("stopped")
            await growing.ended.wait()
            return growing.record
        return await self.record(id)

    async def close(self) -> None:
        """Interrupt all."""
        for growing in self._growing.values():
            growing.cancel("interrupted")
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._storing is not None:
            self._storing.cancel()

    def _check_capacity(self, request: ChatRequest) -> None:
        self._answering.models.check_capacity(request.model)
        if len(self._growing) >= MAX_RUNNING:
            raise Busy

    def _run(self, record: Record, request: ChatRequest, continued: Continued | None) -> None:
        growing = self._growing[record.id] = Growing(record)
        growing.task = asyncio.create_task(self._generate(growing, request, continued))
        task = asyncio.create_task(self._supervise(growing, growing.task))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self._storing is None or self._storing.done():
            self._storing = asyncio.create_task(self._store_all())

    async def _supervise(self, growing: Growing, task: asyncio.Task[None]) -> None:
        """Store the end, however it ends."""
        await asyncio.wait({task})
        try:
            task.result()
        except (asyncio.CancelledError, Stopping):
            end = growing.end or "interrupted"
            final = growing.finished(end, end)
        except (ApiError, KhaoszError, Busy, Failed, TimeoutError, RecursionError) as error:
            final = growing.finished("failed", "error", _explained(error))
        except Exception as error:
            _log.exception("a generation failed")
            final = growing.finished("failed", "error", _explained(error))
        else:
            final = growing.finished("complete", growing.reason or "size_limit")
        await self._store_end(growing, final)
        growing.record = final
        growing.ended.set()
        growing.wake()

    async def _generate(
        self, growing: Growing, request: ChatRequest, continued: Continued | None
    ) -> None:
        answer = await self._answering.open_chat(request, continued)
        try:
            growing.open(answer)
            async for piece in answer.pieces():
                growing.take(piece)
                growing.count(answer)
                if growing.full:
                    growing.reason = None
                    break
            else:
                if growing.reason is None:
                    raise Failed("the answer ended early")
        finally:
            cited = answer.citations(0)
            growing.record.tail.citations = cited.get("citations")
            growing.record.tail.not_found = cited.get("not_found", False)
            answer.close()

    # --------------------------------------------------------------------------------------- store

    async def _store_all(self) -> None:
        """Store what grows, until nothing does."""
        while self._growing:
            await asyncio.sleep(STORE_SECONDS)
            async with self._writes:
                running = [
                    each for each in self._growing.values() if each.task and not each.task.done()
                ]
                growths = [each.growth() for each in running]
                try:
                    gone = await asyncio.to_thread(self.store.grow, growths)
                except ApiError as error:  # tried again
                    _log.error("growing answers cannot be stored: %s", error)
                    continue
                for each, growth in zip(running, growths, strict=True):
                    each.mark_stored(growth)
                    if each.record.id in gone:
                        each.deleted = True
                        each.cancel("interrupted")
            for each in list(self._growing.values()):
                if each.ended.is_set():
                    await self._store_end(each, each.record)

    async def _store_end(self, growing: Growing, final: Record) -> None:
        """If that fails, it is tried again later, and read from memory until then."""
        async with self._writes:
            try:
                stored = await asyncio.to_thread(self.store.finish, final)
            except ApiError as error:
                _log.error("an answer cannot be stored: %s", error)
                return
            growing.deleted = not stored
            del self._growing[final.id]
