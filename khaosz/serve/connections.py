"""Limits on connections: how many there are, and how long a request may take to begin.

uvicorn has neither. Clients that send half a request would hold their sockets until the process has
no file left, and then no client is answered.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0  # for the head of a request to arrive
MAX_CONNECTIONS = 1024
BACKLOG = 50  # connections that the event loop accepts in one turn
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
    """uvicorn's HTTP protocol with at most `most` connections: beyond them, the one that has waited
    longest for a request is closed. So is one whose request has not started after `seconds`."""
    limit = connection_limit() if most is None else most
    waiting: dict[LimitedProtocol, asyncio.TimerHandle] = {}  # in the order of their beginning

    class LimitedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()
            if len(self.connections) > limit:
                longest = next(iter(waiting))
                longest._stop_waiting()
                longest.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                self._wait()  # for the next request

        def _wait(self) -> None:
            self._stop_waiting()
            waiting[self] = self.loop.call_later(seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if timer := waiting.pop(self, None):
                timer.cancel()

    return LimitedProtocol
