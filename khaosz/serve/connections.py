"""Limits on connections: how many there are, and how long they may wait for their clients.

uvicorn has neither. Clients that send half a request, or do not read their answer, would hold their
sockets until the process has no file left, and then no client is answered.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0  # for the head of a request to arrive
READ_SECONDS = 60.0  # for the client to take the next part of an answer
MAX_CONNECTIONS = 1024
BACKLOG = 16  # connections that the event loop accepts in one turn
QUEUE = 512  # connections that the system keeps for the next turns
_ENDING_SECONDS = 2  # of a shutdown, for answers to end
# For models, databases and uploads, and for the connections accepted before the first one over the
# limit is closed: asyncio accepts, calls connection_made and closes in three turns.
_RESERVED_FILES = 64 + 3 * BACKLOG


def connection_limit() -> int:
    """How many connections this process may hold, by its limit of open files, which is raised as
    far as the system allows."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(16, min(MAX_CONNECTIONS, soft - _RESERVED_FILES))


def limited_protocol(
    most: int | None = None, seconds: float = REQUEST_SECONDS
) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with at most `most` connections: beyond them, the one is closed that
    has waited longest for its client to send a request, its body too, or to read the answer. So is
    one whose request has not started after `seconds`, or whose client reads nothing."""
    limit = connection_limit() if most is None else most
    # In the order of their beginning. The app limits the time in which a body arrives.
    waiting: dict[LimitedProtocol, asyncio.TimerHandle | None] = {}

    class LimitedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait(seconds)
            if len(self.connections) > limit:
                longest = next(iter(waiting))
                longest._stop_waiting()
                longest.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is None or self.cycle.response_complete or self not in waiting:
                return
            if self.flow.write_paused:  # a pipelined request waits for the answer before it
                return
            if not self.cycle.more_body:
                self._stop_waiting()
            elif timer := waiting[self]:
                timer.cancel()
                waiting[self] = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                self._wait(seconds)  # for the next request

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait(READ_SECONDS)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def _wait(self, seconds: float) -> None:
            self._stop_waiting()
            # Not `close`, which waits until the client has read what was sent.
            waiting[self] = self.loop.call_later(seconds, self.transport.abort)

        def _stop_waiting(self) -> None:
            if timer := waiting.pop(self, None):
                timer.cancel()

    return LimitedProtocol


class LimitedServer(uvicorn.Server):
    """Accepts `BACKLOG` connections in a turn, while the system queues more: without the queue,
    clients of a burst would try again after a second. Calls `interrupt` shortly before the time of
    a shutdown is over, so that answers end with an error that says so, not with their socket."""

    def __init__(self, config: uvicorn.Config, interrupt: Callable[[], None]) -> None:
        super().__init__(config)
        self._interrupt = interrupt

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = max(0, (self.config.timeout_graceful_shutdown or 0) - _ENDING_SECONDS)
        asyncio.get_running_loop().call_later(seconds, self._interrupt)
        await super().shutdown(sockets)
