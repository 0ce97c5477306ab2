"""The engine's thread, and the tickets of the event loop's requests to it.

Between two steps the thread runs the loop's orders (start, cancel a request); after a step it
delivers the final output. So a cancelled request takes part in one more step at most, also while
its prompt is processed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from khaosz.errors import KhaoszError
from khaosz.inference.adapter import Adapter
from khaosz.inference.engine import Engine
from khaosz.inference.grammar import Matcher, matcher_for
from khaosz.inference.request import Output
from khaosz.inference.sampling import SamplingParams

T = TypeVar("T")

_log = logging.getLogger("khaosz.serve")


class Busy(Exception):
    """The queue is full."""


class Failed(Exception):
    """An unexpected error of the engine; the log has it."""


class Stopping(Failed):
    """The service shuts down before the answer is complete."""


@dataclass(eq=False)
class Ticket:
    """One request, from the event loop's side."""

    prompt: list[int]
    params: SamplingParams
    adapter: Adapter | None
    close: Callable[[], None]  # cancels the request, or frees its slot when it is done
    matcher: Matcher | None = None
    request_id: int | None = None  # the engine thread's
    accepted: asyncio.Future[None] = field(default_factory=asyncio.Future)
    events: asyncio.Queue[Output | Exception | None] = field(default_factory=asyncio.Queue)

    def expire(self) -> None:
        """The request's time is over: `outputs` raises `TimeoutError`."""
        self.events.put_nowait(TimeoutError())

    async def outputs(self) -> AsyncIterator[Output]:
        """The final output of all choices; ends early when the ticket is closed.

        Raises `Failed`, `TimeoutError`, or the `KhaoszError` that ended a choice.
        """
        choices = self.params.n
        while choices:
            match await self.events.get():
                case None:
                    return
                case Exception() as error:
                    raise error
                case Output(error=error) if error is not None:
                    raise error
                case output:
                    choices -= output.finish_reason is not None
                    yield output


class EngineThread:
    """Steps an engine while it has requests. All methods are for one event loop."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        """`max_queue`: maximum of running and waiting requests."""
        assert max_queue >= 1, max_queue
        self.engine, self.max_queue = engine, max_queue
        self._open: set[Ticket] = set()  # the event loop's
        self._tickets: dict[int, Ticket] = {}  # the thread's, by request id
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="khaosz-engine", daemon=True)

    def start(self) -> None:
        """Does nothing if it was started before."""
        if self._thread.ident is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    def interrupt(self) -> None:
        """Running and waiting requests raise `Stopping`."""
        for ticket in self._open:
            ticket.events.put_nowait(Stopping())

    async def stop(self) -> None:
        """Running requests fail."""
        self._inbox.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Running and waiting requests."""
        return len(self._open)

    def shrink_prefix_cache(self, nbytes: int) -> None:
        """Drop prefixes beyond this size, the least recently used first."""
        self._inbox.put(partial(self.engine.prefixes.shrink, nbytes))

    def check_capacity(self) -> None:
        """Raises `Busy` when the queue is full; cheap enough to call before encoding a text."""
        if len(self._open) >= self.max_queue:
            raise Busy

    async def submit(
        self, prompt: list[int], params: SamplingParams, adapter: Adapter | None = None
    ) -> Ticket:
        """Add a request to the engine. The caller must close its ticket.

        Raises `Busy` when the queue is full, `GenerationError` as `Engine.add` does, `Failed`.
        """
        self.check_capacity()
        if not self.alive:
            raise Failed("the engine's thread ended")
        ticket = Ticket(prompt, params, adapter, lambda: self._close(ticket))
        self._open.add(ticket)
        with ExitStack() as undo:
            undo.callback(ticket.close)
            if params.form is not None:
                # In another thread: compiling a large grammar would delay other answers.
                ticket.matcher = await asyncio.to_thread(
                    wrap_unexpected,
                    lambda: matcher_for(params, self.engine.tokenizer),
                    "compiling a grammar failed",
                )
            self._inbox.put(partial(self._start_request, ticket))
            await ticket.accepted
            undo.pop_all()
        return ticket

    def _close(self, ticket: Ticket) -> None:
        if ticket in self._open:
            self._open.remove(ticket)
            ticket.events.put_nowait(None)
            self._inbox.put(partial(self._cancel, ticket))

    # ----------------------------------------------------------------------- in the engine's thread

    def _work(self) -> None:
        try:
            while True:
                if self._inbox.empty() and self.engine.unfinished:
                    self._advance()
                    continue
                order = self._inbox.get()
                if order is None:
                    return
                order()
        finally:
            for ticket in self._tickets.values():
                self._call_in_loop(ticket.events.put_nowait, Failed("the engine's thread ended"))

    def _start_request(self, ticket: Ticket) -> None:
        try:
            ticket.request_id = wrap_unexpected(
                lambda: self.engine.add(
                    ticket.prompt, ticket.params, adapter=ticket.adapter, matcher=ticket.matcher
                ),
                "adding a request failed",
            )
        except (KhaoszError, Failed) as error:
            self._call_in_loop(_settle, ticket.accepted, error)
        else:
            self._tickets[ticket.request_id] = ticket
            self._call_in_loop(_settle, ticket.accepted, None)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.request_id in self._tickets:
            del self._tickets[ticket.request_id]
            self.engine.cancel(ticket.request_id)
            self.engine.take(ticket.request_id)

    def _advance(self) -> None:
        try:
            wrap_unexpected(self.engine.step, "a step of the engine failed")
        except Failed as error:
            # Which request caused it is unknown, and so is the state of the caches: reset them.
            for request_id, ticket in self._tickets.items():
                self.engine.cancel(request_id)
                self._call_in_loop(ticket.events.put_nowait, error)
            self._tickets.clear()
            self.engine.take()
            self.engine.weights_changed()
            return
        outputs = [(self._tickets.get(output.request_id), output) for output in self.engine.take()]
        self._call_in_loop(_deliver, outputs)  # together: the loop wakes up once per step

    def _call_in_loop(self, function: Callable[..., object], *values: object) -> None:
        self._loop.call_soon_threadsafe(function, *values)


def _deliver(outputs: list[tuple[Ticket | None, Output]]) -> None:
    for ticket, output in outputs:
        if ticket is not None:
            ticket.events.put_nowait(output)


def wrap_unexpected(work: Callable[[], T], what: str) -> T:
    """Log anything but a `KhaoszError` and raise `Failed(what)`: one request's error must not end
    the thread that all requests share."""
    try:
        return work()
    except KhaoszError:
        raise
    except Exception as error:
        _log.exception(what)
        raise Failed(what) from error


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # its request was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
