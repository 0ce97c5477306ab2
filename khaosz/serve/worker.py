"""The engine's own thread, and the tickets by which requests of an event loop share it.

Between two steps the thread does what the loop asked of it (begin, cancel); after a step it hands
out what became final. So a request that is cancelled takes part in one more step at most, also
amid its prompt.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
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
    """As many requests as may be held are under way or waiting."""


class Failed(Exception):
    """The engine met an error that nobody asked for; the log has it."""


class Ticket:
    """One request, as the event loop sees it."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        adapter: Adapter | None,
        close: Callable[[], None],
    ) -> None:
        self.prompt, self.params, self.adapter = prompt, params, adapter
        self.matcher: Matcher | None = None
        self.close = close  # gives the request up, or its place back when it is done
        self.request_id: int | None = None  # the engine thread's
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.events: asyncio.Queue[Output | Exception | None] = asyncio.Queue()

    def expire(self) -> None:
        """The time that the request had is over: `outputs` raises `TimeoutError`."""
        self.events.put_nowait(TimeoutError())

    async def outputs(self) -> AsyncIterator[Output]:
        """What becomes final, of all choices; ends early when the ticket was closed.

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
    """Steps an engine while there is work. Its methods belong to one event loop."""

    def __init__(self, engine: Engine, max_queue: int) -> None:
        """`max_queue`: requests held at most, under way and waiting."""
        assert max_queue >= 1, max_queue
        self.engine, self.max_queue = engine, max_queue
        self._held: set[Ticket] = set()  # the event loop's
        self._tickets: dict[int, Ticket] = {}  # the thread's, by request id
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="khaosz-engine", daemon=True)

    def start(self) -> None:
        """Does nothing where it was started before."""
        if self._thread.ident is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    async def stop(self) -> None:
        """Requests that are still under way fail."""
        self._inbox.put(None)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def held(self) -> int:
        return len(self._held)

    def keep_at_most(self, nbytes: int) -> None:
        """Forget kept caches beyond this, the longest unused first."""
        self._inbox.put(partial(self.engine.prefixes.shrink, nbytes))

    def check_room(self) -> None:
        """Raises `Busy` when no more requests are held; worth asking before a text is encoded."""
        if len(self._held) >= self.max_queue:
            raise Busy

    async def submit(
        self, prompt: list[int], params: SamplingParams, adapter: Adapter | None = None
    ) -> Ticket:
        """A request that the engine has taken on. Close its ticket, whatever comes.

        Raises `Busy` when no more are held, `GenerationError` as `Engine.add` does, `Failed`.
        """
        self.check_room()
        if not self.alive:
            raise Failed("the engine's thread has ended")
        ticket = Ticket(prompt, params, adapter, lambda: self._close(ticket))
        self._held.add(ticket)
        with ExitStack() as undo:
            undo.callback(ticket.close)
            if params.form is not None:
                # Beside the engine: while a large grammar is compiled, others' answers go on.
                ticket.matcher = await asyncio.to_thread(
                    wrap_unexpected,
                    lambda: matcher_for(params, self.engine.tokenizer),
                    "a grammar was not compiled",
                )
            self._inbox.put(partial(self._begin, ticket))
            await ticket.accepted
            undo.pop_all()
        return ticket

    def _close(self, ticket: Ticket) -> None:
        if ticket in self._held:
            self._held.remove(ticket)
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
                self._tell(ticket.events.put_nowait, Failed("the engine's thread has ended"))

    def _begin(self, ticket: Ticket) -> None:
        try:
            ticket.request_id = wrap_unexpected(
                lambda: self.engine.add(
                    ticket.prompt, ticket.params, adapter=ticket.adapter, matcher=ticket.matcher
                ),
                "a request was not taken on",
            )
        except (KhaoszError, Failed) as error:
            self._tell(_settle, ticket.accepted, error)
        else:
            self._tickets[ticket.request_id] = ticket
            self._tell(_settle, ticket.accepted, None)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.request_id in self._tickets:
            del self._tickets[ticket.request_id]
            self.engine.cancel(ticket.request_id)
            self.engine.take(ticket.request_id)

    def _advance(self) -> None:
        try:
            wrap_unexpected(self.engine.step, "a step of the engine failed")
        except Failed as error:
            # Which request it was isn't known, nor what the caches hold: begin anew.
            for request_id, ticket in self._tickets.items():
                self.engine.cancel(request_id)
                self._tell(ticket.events.put_nowait, error)
            self._tickets.clear()
            self.engine.take()
            self.engine.weights_changed()
            return
        outputs = [(self._tickets.get(output.request_id), output) for output in self.engine.take()]
        self._tell(_hand_out, outputs)  # all at once: the loop is woken once a step

    def _tell(self, what: Callable[..., object], *values: object) -> None:
        self._loop.call_soon_threadsafe(what, *values)


def _hand_out(outputs: list[tuple[Ticket | None, Output]]) -> None:
    for ticket, output in outputs:
        if ticket is not None:
            ticket.events.put_nowait(output)


def wrap_unexpected(work: Callable[[], T], what: str) -> T:
    """Raises `Failed` for anything that isn't a `KhaoszError`: one request's surprise must not end
    the thread that all of them share."""
    try:
        return work()
    except KhaoszError:
        raise
    except Exception as error:
        raise _logged(Failed(what)) from error


def _logged(error: Failed) -> Failed:
    _log.exception(str(error))
    return error


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():  # whoever waited has left
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
