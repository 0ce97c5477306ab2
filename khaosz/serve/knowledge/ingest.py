"""The two threads of a knowledge base: one ingests uploads in the background, one searches.

They share only the file (SQLite: one writer, any number of readers), so searches do not wait for
uploads. The queue is in the catalogue: the ingesting thread ends when the queue is empty, and a
killed one loses nothing.
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
from khaosz.serve.knowledge.catalogue import BaseRow, Catalogue, FileRow, IngestError
from khaosz.serve.knowledge.uploads import Uploads
from khaosz.serve.retrieval_models import RetrievalModels, UnknownName

T = TypeVar("T")

_log = logging.getLogger("khaosz.serve")

UNREADABLE = IngestError(
    "base_unreadable", "cannot be read or written; is its file damaged, or the disk full?"
)
UNUSABLE = IngestError(
    "embedder_unusable",
    "its embedder is not available, cannot be used, or differs from the one that built it",
)
UNEXPECTED = IngestError("unexpected", "unexpected error; see the server's log")


@dataclass(frozen=True)
class Shared:
    """What all knowledge bases use."""

    catalogue: Catalogue
    uploads: Uploads
    retrieval: RetrievalModels
    reading: threading.Semaphore  # limits the files read at once


class _Stopped(Exception):
    """The base is stopping, or the file was removed or replaced."""


class Base:
    """Thread-safe, except `read`, which is for the event loop."""

    def __init__(self, row: BaseRow, path: Path, shared: Shared) -> None:
        self.name, self.embedder, self.created = row.name, row.embedder, row.created
        self.path = path
        self.error: IngestError | None = None  # why the base cannot be used
        self._shared = shared
        self._progress: FileRow | None = None  # of the file that is being ingested
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None
        self._pool: WorkerPool | None = None
        self._stopping = False
        self._compared = False  # with the catalogue
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="khaosz-search")
        self._opened: KnowledgeBase | None = None  # the reader's
        self._with_embedder = False

    def with_progress(self, row: FileRow) -> FileRow:
        now = self._progress
        if now is None or now.number != row.number or row.status != "queued":
            return row
        return now

    # -------------------------------------------------------------------------------------- search

    async def read(self, work: Callable[[KnowledgeBase], T], *, embedder: bool = False) -> T:
        """Run `work` in the searching thread, with the base's embedder if it needs one.

        Raises `ApiError` where the base or its embedder cannot be used, and what `work` raises.
        """
        return await asyncio.wrap_future(self._submit(lambda: self._read(work, embedder)))

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        try:
            return self._reader.submit(work)
        except RuntimeError:  # the base was stopped
            raise ApiError(404, f"knowledge base {self.name!r} not found") from None

    def _read(self, work: Callable[[KnowledgeBase], T], embedder: bool) -> T:
        try:
            return work(self._reader_base(embedder))
        except (KhaoszError, UnknownName, sqlite3.DatabaseError) as error:
            code, message = self._failure(error)
            message = f"knowledge base {self.name!r}: {message}"
            raise ApiError(409, message, code=code) from None

    def _reader_base(self, embedder: bool) -> KnowledgeBase:
        if embedder and not self._with_embedder:
            self._close_reader()
        if self._opened is None:
            self._opened = self._open(embedder)
            self._with_embedder = embedder
        return self._opened

    def _open(self, embedder: bool) -> KnowledgeBase:
        if not embedder or self.embedder is None:
            return KnowledgeBase(self.path)
        return KnowledgeBase(self.path, embedder=self._shared.retrieval.embedder(self.embedder))

    def _failure(self, error: Exception) -> IngestError:
        """Without the error's own text, which may name paths; the log has it."""
        _log.warning("knowledge base %r: %s", self.name, error)
        return UNREADABLE if isinstance(error, DataError | sqlite3.DatabaseError) else UNUSABLE

    def _close_reader(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    # -------------------------------------------------------------------------------------- ingest

    def try_again(self) -> None:
        """Use a base again that had an error. Raises `ApiError` if it still has."""

        def reopen() -> None:
            self._close_reader()
            self._read(lambda base: base.store.counts(), embedder=True)

        self._submit(reopen).result()
        self.error = None

    def wake(self) -> None:
        """Start ingesting, if the thread does not run."""
        with self._lock:
            if self._writer is None and not self._stopping:
                self._writer = threading.Thread(
                    target=self._work, name="khaosz-ingest", daemon=True
                )
                self._writer.start()

    def remove(self, row: FileRow) -> None:
        """Remove the document of a file marked as removed: at once if nothing is being written,
        else as the ingesting thread's next job."""
        with suppress(KhaoszError, sqlite3.DatabaseError, ApiError):
            self._submit(lambda: self._remove(self._reader_base(embedder=False), row)).result()
        self.wake()

    def _remove(self, base: KnowledgeBase, row: FileRow) -> None:
        with base.store.writing():
            # A new file of that name may have been ingested before this transaction.
            if self._shared.catalogue.is_still("removed", row):
                base.store.remove_source(DEFAULT_COLLECTION, row.name)
        self._shared.catalogue.forget(row)

    def stop(self, seconds: float | None = None) -> None:
        """End both threads. The next server starts the current file again."""
        with self._lock:
            self._stopping = True
            pool, writer = self._pool, self._writer
        if pool is not None:
            pool.close()
        if writer is not None:
            writer.join(seconds)
        with suppress(RuntimeError):  # stopped before
            self._reader.submit(self._close_reader)
        self._reader.shutdown()

    def delete_files(self) -> None:
        """After `stop`."""
        for end in ("", "-wal", "-shm", ".usearch", ".usearch.json"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)

    # ---------------------------------------------------------------------- in the ingesting thread

    def _work(self) -> None:
        failure = None
        try:
            with WorkerPool(Limits(workers=1)) as pool:
                with self._lock:
                    self._pool = pool
                self._run_queue(pool)
        except (KhaoszError, UnknownName, sqlite3.DatabaseError) as error:
            failure = self._failure(error)
        except Exception:
            failure = UNEXPECTED
            _log.exception("knowledge base %r", self.name)
        if failure is not None:
            with self._lock:
                self.error = failure
                self._writer = self._pool = None

    def _run_queue(self, pool: WorkerPool) -> None:
        if not self._compared:
            with self._open(embedder=False) as base:
                _reconcile(base, self._shared.catalogue, self.name)
            self._compared = True
        self.error = None
        while (row := self._next()) is not None:
            # The embedder is opened for the first file, not before.
            with self._open(embedder=row.status == "queued") as base:
                if row.status == "removed":
                    self._remove(base, row)
                    continue
                try:
                    self._ingest(base, row, pool)
                finally:
                    self._progress = None

    def _next(self) -> FileRow | None:
        # Under the lock: `wake` must see a thread that will find its file, or none.
        with self._lock:
            row = None if self._stopping else self._shared.catalogue.next_job(self.name)
            if row is None:
                self._writer = self._pool = None
            return row

    def _ingest(self, base: KnowledgeBase, row: FileRow, pool: WorkerPool) -> None:
        def on_chunk(done: int, of: int) -> None:
            self._check(row)
            self._progress = replace(row, status="embedding", chunks=of, embedded=done)

        self._progress = replace(row, status="reading")
        try:
            source, documents, note = self._load(row, pool)
            self._check(row)
            report = base.put(source, documents, on_chunk=on_chunk)
        except _Stopped:
            if not self._stopping:
                _remove_document(base, row.name)
            return
        except DocumentError as error:
            failure = IngestError(error.code, _one_line(str(error), error.hint))
        except (DataError, sqlite3.DatabaseError):
            raise  # of the base's file: `wake` tries again, and the disk may have space then
        except KhaoszError as error:
            _log.warning("knowledge base %r: %s: %s", self.name, row.name, error)
            failure = IngestError("embedder_failed", f"the embedder {self.embedder!r} failed")
        except Exception:
            _log.exception("knowledge base %r: %s", self.name, row.name)
            failure = IngestError("unexpected", "reading it failed; see the server's log")
        else:
            # A killed server may have stored all chunks; then none is new.
            chunks = report.chunks or _count(base, row.name)
            embedded = 0 if self.embedder is None else chunks
            if not self._shared.catalogue.settle(row, "ready", note, chunks, embedded):
                _remove_document(base, row.name)  # removed or replaced meanwhile
            return
        _remove_document(base, row.name)
        self._shared.catalogue.settle(row, "failed", failure)

    def _load(
        self, row: FileRow, pool: WorkerPool
    ) -> tuple[Source, list[Document], IngestError | None]:
        """Also the error of a part of the file."""
        path = self._shared.uploads.path(row.sha256)
        problems: list[Problem] = []
        try:
            with self._shared.reading:
                source, documents = load_file(path, row.name, pool=pool, on_problem=problems.append)
        except DocumentError:
            if self._stopping:
                raise _Stopped from None
            raise
        note = _one_line(problems[0].message, problems[0].hint) if problems else None
        if not any(document.text for document in documents):
            raise DocumentError(note or "has no text in it", code="no_text")
        return source, documents, IngestError("partly", note) if note else None

    def _check(self, row: FileRow) -> None:
        if self._stopping or not self._shared.catalogue.is_still("queued", row):
            raise _Stopped


def _reconcile(base: KnowledgeBase, catalogue: Catalogue, name: str) -> None:
    """Make a base match the catalogue: after a power cut it may lack what was written last, after a
    kill it may contain what was removed."""
    store = base.store
    stored = {source.path: source.sha256 for _, source in store.sources()}
    rows = catalogue.files(name, removed=True)
    for path in stored.keys() - {row.name for row in rows}:
        _remove_document(base, path)
    unembedded: set[str] = set()
    if base.embedder_name is not None and store.vector_count < store.chunk_count:
        owners = store.owners([chunk.document for chunk in store.unembedded()])
        unembedded = {owner.path for owner in owners.values()}
    for row in rows:
        if row.status == "ready" and (stored.get(row.name) != row.sha256 or row.name in unembedded):
            catalogue.queue_again(row)


def _remove_document(base: KnowledgeBase, name: str) -> None:
    with base.store.writing():
        base.store.remove_source(DEFAULT_COLLECTION, name)


def _count(base: KnowledgeBase, name: str) -> int:
    contents = base.store.contents(DEFAULT_COLLECTION, name)
    return sum(len(document.chunks) for document in contents)


def _one_line(message: str, hint: str | None) -> str:
    return " ".join(f"{message}: {hint}".split()) if hint else message
