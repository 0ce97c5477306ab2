"""One base at work: a thread that reads what was uploaded, and one that searches.

They share nothing but the file (SQLite: one writer, any number of readers), so a search waits for
no upload. What is to be done stands in the catalogue, not here: the thread ends when there is
nothing left, and one that was killed has lost nothing.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from khaosz.errors import DataError, DocumentError, KhaoszError
from khaosz.rag.knowledge_base import DEFAULT_COLLECTION, KnowledgeBase
from khaosz.rag.load import Document, Limits, Problem, Source, WorkerPool, load_file
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.catalogue import Catalogue, FileRow, Status
from khaosz.serve.knowledge.uploads import Uploads
from khaosz.serve.replies import FAILING, UNEXPECTED, UNREADABLE, IngestError
from khaosz.serve.retrieval_models import RetrievalModels, UnknownName

T = TypeVar("T")

_log = logging.getLogger("khaosz.serve")


@dataclass(frozen=True)
class Progress:
    """Of the file that is being read, by its number."""

    number: int
    status: Status
    chunks: int = 0
    embedded: int = 0


@dataclass(frozen=True)
class Shared:
    """What all bases use."""

    catalogue: Catalogue
    uploads: Uploads
    retrieval: RetrievalModels
    reading: threading.Semaphore  # files read at once


class _Stopped(Exception):
    """The base ends, or the file was removed or replaced: nothing more is to be done for it."""


class Base:
    """Its methods may be called from any thread, `read` from the event loop."""

    def __init__(self, name: str, embedder: str | None, path: Path, shared: Shared) -> None:
        """embedder: by the name that it is offered under."""
        self.name, self.embedder, self.path = name, embedder, path
        self.trouble: IngestError | None = None  # why the base cannot be used
        self._shared = shared
        self._now: Progress | None = None
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None
        self._pool: WorkerPool | None = None
        self._stopping = False
        self._compared = False  # whether the base holds what the catalogue says
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="khaosz-search")
        self._opened: KnowledgeBase | None = None  # the reader's
        self._with_embedder = False

    def shown(self, row: FileRow) -> FileRow:
        """With what is being done now."""
        now = self._now
        if now is None or now.number != row.number or row.status != "queued":
            return row
        return replace(row, status=now.status, chunks=now.chunks, embedded=now.embedded)

    # ---------------------------------------------------------------------------------------- find

    async def read(self, work: Callable[[KnowledgeBase], T], *, embedder: bool = False) -> T:
        """What `work` finds in the base, with its embedder where it needs one.

        Raises `ApiError` where the base or its embedder cannot be used, and what `work` raises.
        """
        return await asyncio.wrap_future(self._submit(lambda: self._read(work, embedder)))

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        try:
            return self._reader.submit(work)
        except RuntimeError:  # it has ended
            raise ApiError(404, f"there is no knowledge base {self.name!r}") from None

    def _read(self, work: Callable[[KnowledgeBase], T], embedder: bool) -> T:
        try:
            if self._opened is not None and embedder and not self._with_embedder:
                self._close_reader()
            if self._opened is None:
                self._opened = self._open(embedder)
                self._with_embedder = embedder
            return work(self._opened)
        except (KhaoszError, UnknownName, sqlite3.DatabaseError) as error:
            raise self._unusable(error) from None

    def _open(self, embedder: bool) -> KnowledgeBase:
        if not embedder or self.embedder is None:
            return KnowledgeBase(self.path)
        return KnowledgeBase(self.path, embedder=self._shared.retrieval.embedder(self.embedder))

    def _unusable(self, error: Exception) -> ApiError:
        """What of it may be told: errors name paths."""
        _log.warning("knowledge base %r: %s", self.name, error)
        if isinstance(error, DataError | sqlite3.DatabaseError):
            message = f"the knowledge base {self.name!r} {UNREADABLE.message}"
            return ApiError(409, message, code=UNREADABLE.code)
        message = f"the knowledge base {self.name!r}: {FAILING.message}"
        return ApiError(409, message, code=FAILING.code)

    def _close_reader(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    # ----------------------------------------------------------------------------------------- add

    def try_again(self) -> None:
        """One that could not be used. Raises `ApiError` if it still cannot."""

        def opened_anew() -> None:
            self._close_reader()
            self._read(lambda base: base.store.counts(), embedder=True)

        self._submit(opened_anew).result()
        self.trouble = None

    def wake(self) -> None:
        """There is something to be done."""
        with self._lock:
            if self._writer is None and not self._stopping:
                self._writer = threading.Thread(
                    target=self._work, name="khaosz-ingest", daemon=True
                )
                self._writer.start()

    def remove(self, row: FileRow) -> None:
        """At once where the base is free; else the thread that writes does it next. The file must
        be marked as removed."""
        with suppress(KhaoszError, sqlite3.DatabaseError, ApiError):
            self._submit(lambda: self._remove_now(row)).result()
        self.wake()

    def _remove_now(self, row: FileRow) -> None:
        if self._opened is None:
            self._opened = self._open(embedder=False)
            self._with_embedder = False
        self._remove(self._opened, row)

    def _remove(self, base: KnowledgeBase, row: FileRow) -> None:
        with base.store.writing():
            # Another of that name may have come and been read meanwhile; not while we write.
            if self._shared.catalogue.is_still("removed", row):
                base.store.remove_source(DEFAULT_COLLECTION, row.name)
        self._shared.catalogue.forget(row)

    def stop(self, seconds: float | None = None) -> None:
        """Ends both threads; what is being read is begun anew by another server."""
        with self._lock:
            self._stopping = True
            pool, writer = self._pool, self._writer
        if pool is not None:
            pool.close()
        if writer is not None:
            writer.join(seconds)
        with suppress(RuntimeError):  # it has ended before
            self._reader.submit(self._close_reader)
        self._reader.shutdown()

    def delete_files(self) -> None:
        """After `stop`."""
        for end in ("", "-wal", "-shm", ".usearch", ".usearch.json"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)

    # ------------------------------------------------------------------------ in the writing thread

    def _work(self) -> None:
        why = None
        try:
            with WorkerPool(Limits(workers=1)) as pool:
                with self._lock:
                    self._pool = pool
                self._do_all(pool)
        except (DataError, sqlite3.DatabaseError) as error:
            why = UNREADABLE
            _log.warning("knowledge base %r: %s", self.name, error)
        except (KhaoszError, UnknownName) as error:
            why = FAILING
            _log.warning("knowledge base %r: %s", self.name, error)
        except Exception:
            why = UNEXPECTED
            _log.exception("knowledge base %r", self.name)
        if why is not None:
            with self._lock:
                self.trouble = why
                self._writer = self._pool = None

    def _do_all(self, pool: WorkerPool) -> None:
        if not self._compared:
            with self._open(embedder=False) as base:
                _compare(base, self._shared.catalogue, self.name)
            self._compared = True
        self.trouble = None
        while (row := self._next()) is not None:
            # No model is opened before there is something to embed.
            with self._open(embedder=row.status == "queued") as base:
                if row.status == "removed":
                    self._remove(base, row)
                    continue
                try:
                    self._ingest(base, row, pool)
                finally:
                    self._now = None

    def _next(self) -> FileRow | None:
        # Under the lock: `wake` after a file was queued finds the thread going on, or ended.
        with self._lock:
            row = None if self._stopping else self._shared.catalogue.next_job(self.name)
            if row is None:
                self._writer = self._pool = None
            return row

    def _ingest(self, base: KnowledgeBase, row: FileRow, pool: WorkerPool) -> None:
        def on_chunk(done: int, of: int) -> None:
            self._check(row)
            self._now = Progress(row.number, "embedding", of, done)

        self._now = Progress(row.number, "reading")
        try:
            source, documents, note = self._load(row, pool)
            self._check(row)
            report = base.put(source, documents, on_chunk=on_chunk)
        except _Stopped:
            if not self._stopping:
                _take_out(base, row.name)
            return
        except DocumentError as error:
            why = IngestError(error.code, _line(str(error), error.hint))
        except (DataError, sqlite3.DatabaseError):
            raise  # of the base's file: the disk may have room again when it is woken
        except KhaoszError as error:
            _log.warning("knowledge base %r: %s: %s", self.name, row.name, error)
            why = IngestError("embedder_failed", f"the embedder {self.embedder!r} failed")
        except Exception:
            _log.exception("knowledge base %r: %s", self.name, row.name)
            why = IngestError("unexpected", "reading it failed; the server's log has more")
        else:
            # Those that were there before a server was killed are not counted as new.
            chunks = report.chunks or _count(base, row.name)
            embedded = 0 if self.embedder is None else chunks
            if not self._shared.catalogue.settle(row, "ready", note, chunks, embedded):
                _take_out(base, row.name)  # removed or replaced meanwhile
            return
        _take_out(base, row.name)
        self._shared.catalogue.settle(row, "failed", why)

    def _load(
        self, row: FileRow, pool: WorkerPool
    ) -> tuple[Source, list[Document], IngestError | None]:
        """Also what is wrong with a part of the file."""
        path = self._shared.uploads.path(row.sha256)
        problems: list[Problem] = []
        try:
            with self._shared.reading:
                source, documents = load_file(path, row.name, pool=pool, on_problem=problems.append)
        except DocumentError:
            if self._stopping:
                raise _Stopped from None
            raise
        note = _line(problems[0].message, problems[0].hint) if problems else None
        if not any(document.text for document in documents):
            raise DocumentError(note or "has no text in it", code="no_text")
        return source, documents, IngestError("partly", note) if note else None

    def _check(self, row: FileRow) -> None:
        if self._stopping or not self._shared.catalogue.is_still("queued", row):
            raise _Stopped


def _compare(base: KnowledgeBase, catalogue: Catalogue, name: str) -> None:
    """After a power cut the base may lack what was written last; after a kill it may hold what was
    removed."""
    store = base.store
    held = {source.path: source.sha256 for _, source in store.sources()}
    rows = catalogue.files(name, removed=True)
    for path in held.keys() - {row.name for row in rows}:
        _take_out(base, path)
    lacking: set[str] = set()
    if base.embedder_name is not None and store.vector_count < store.chunk_count:
        owners = store.owners([chunk.document for chunk in store.unembedded()])
        lacking = {owner.path for owner in owners.values()}
    for row in rows:
        if row.status == "ready" and (held.get(row.name) != row.sha256 or row.name in lacking):
            catalogue.queue_again(row)


def _take_out(base: KnowledgeBase, name: str) -> None:
    with base.store.writing():
        base.store.remove_source(DEFAULT_COLLECTION, name)


def _count(base: KnowledgeBase, name: str) -> int:
    contents = base.store.contents(DEFAULT_COLLECTION, name)
    return sum(len(document.chunks) for document in contents)


def _line(message: str, hint: str | None) -> str:
    return " ".join(f"{message}: {hint}".split()) if hint else message
