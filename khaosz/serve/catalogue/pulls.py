"""Models that are fetched, checked and added to the served ones, each in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Literal

from khaosz.errors import KhaoszError
from khaosz.interop.fetch.pull import pull
from khaosz.interop.fetch.store import drop_stage
from khaosz.interop.models import default_name
from khaosz.serve.catalogue.rows import Row
from khaosz.serve.models import Model, Models, describe

_WINDOW_S = 10.0  # that a rate is measured over
_log = logging.getLogger(__name__)


class _Cancelled(Exception):
    """Raised out of `pull`, which catches its own errors only."""


@dataclass
class Pull:
    """`bytes` of `total` have arrived, from `source`; `model` is the name it is served by."""

    name: str
    total: int
    bytes: int = 0
    state: Literal["running", "complete", "failed", "cancelled"] = "running"
    source: str | None = None
    model: str | None = None
    error: Exception | None = None
    thread: Thread | None = None
    discard: bool = False
    _cancel: Event = field(default_factory=Event)
    _arrivals: deque[tuple[float, int]] = field(default_factory=deque)

    def report(self, file: str, done: int, total: int) -> None:
        """In the thread. Raises `_Cancelled`."""
        if self._cancel.is_set():
            raise _Cancelled
        if not total:
            return
        now = time.monotonic()
        if done < self.bytes:  # another source, or again from the beginning
            self._arrivals.clear()
        self.bytes, self.total = done, total
        if not self._arrivals or now - self._arrivals[-1][0] > 0.25:
            self._arrivals.append((now, done))
        while now - self._arrivals[0][0] > _WINDOW_S:
            self._arrivals.popleft()

    def tried(self, source: str) -> None:
        self.source, self.bytes = source, 0
        self._arrivals.clear()

    @property
    def rate(self) -> float | None:
        """Bytes a second; None until it is known."""
        arrivals = list(self._arrivals)
        if self.state != "running" or len(arrivals) < 2:
            return None
        (start, before), (_, after) = arrivals[0], arrivals[-1]
        return max(0, after - before) / max(1e-3, time.monotonic() - start)

    def cancel(self) -> None:
        self._cancel.set()


class Pulls:
    """`source` as `pull` takes it. Methods are for the event loop of `models`."""

    def __init__(self, models: Models, source: str | None = None) -> None:
        self.models, self.source = models, source
        self.on_added: Callable[[], None] = lambda: None
        self._pulls: dict[str, Pull] = {}

    def get(self, name: str) -> Pull | None:
        return self._pulls.get(name)

    def start(self, row: Row) -> Pull:
        """Serve a model; fetch it first unless it is here. A running pull continues."""
        before = self._pulls.get(row.name)
        if before is not None and before.state == "running":
            return before
        started = Pull(row.name, row.bytes)
        loop = asyncio.get_running_loop()
        previous = None if before is None else before.thread
        started.thread = Thread(
            target=self._work, args=(started, row, previous, loop), name=f"pull-{row.name}",
            daemon=True,
        )  # fmt: skip
        self._pulls[row.name] = started
        started.thread.start()
        return started

    def cancel(self, name: str, *, discard: bool) -> Pull | None:
        """End a pull, or forget how it ended. What has arrived stays for the next one, unless it is
        discarded. None where there is none."""
        current = self._pulls.get(name)
        if current is not None and current.state == "running":
            current.state, current.discard = "cancelled", discard
            current.cancel()
            return current
        if current is not None and current.thread is not None and current.thread.is_alive():
            current.discard = discard  # it ends as soon as its source sends something
            return current
        self._pulls.pop(name, None)
        if discard:
            Thread(target=drop_stage, args=(name,), daemon=True).start()
        return current

    async def stop(self) -> None:
        """End all pulls; one whose source is silent may outlive this by seconds."""
        for each in self._pulls.values():
            each.cancel()
        threads = [each.thread for each in self._pulls.values() if each.thread is not None]
        end = time.monotonic() + 2.0
        while any(map(Thread.is_alive, threads)) and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def name_for(self, row: Row, path: Path) -> str:
        """The name a model is served by: the short one, unless another model has it."""
        short = default_name(path) if row.origin in ("trained", "pulled") else row.name
        return row.name if short in self.models.names else short

    def _work(
        self, started: Pull, row: Row, previous: Thread | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        if previous is not None:
            previous.join()
        model: Model | None = None
        try:
            path = row.path or pull(
                row.name, started.report, source=self.source, trying=started.tried
            )
            model = describe(self.name_for(row, path), path, {})
        except _Cancelled:
            if started.discard:
                drop_stage(row.name)
        except KhaoszError as error:
            started.error = error
        except Exception as error:
            _log.exception("%s", row.name)
            started.error = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._finish, started, model)

    def _finish(self, started: Pull, model: Model | None) -> None:
        try:
            name = None if model is None else self.models.name_of(model.source)
            if model is not None and name is None:
                self.models.add(model)
                self.on_added()
        except KhaoszError as error:
            started.error = error
        if started.error is not None:
            _log.error("%s: %s", started.name, started.error)
            started.state = "failed" if started.state == "running" else started.state
        elif model is not None:
            started.state, started.model = "complete", name or model.name
