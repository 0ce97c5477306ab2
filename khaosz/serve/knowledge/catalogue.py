"""The knowledge bases of the service and their files: the record that survives a power cut.

A file is recorded here before its upload is answered, and the contents of a knowledge base can be
rebuilt from here and the uploads. One process at a time; a second one gets an error.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from khaosz.database import (
    close_on_error,
    database_errors,
    examine,
    open_database,
    require_version,
    transaction,
)
from khaosz.errors import ConfigError, DataError
from khaosz.files import natural_key
from khaosz.serve.replies import Code

# removed: clients no longer see it, its document may still be in the base.
Status = Literal["queued", "reading", "embedding", "ready", "failed", "removed"]
VERSION = 2
_UPGRADES = {1: "ALTER TABLE files ADD COLUMN code TEXT"}
_SCHEMA = """
CREATE TABLE bases (
    key TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, embedder TEXT, created INTEGER NOT NULL,
    deleting INTEGER NOT NULL DEFAULT 0);
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, base TEXT NOT NULL, name TEXT NOT NULL,
    id TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL, status TEXT NOT NULL,
    error TEXT, code TEXT, chunks INTEGER NOT NULL DEFAULT 0, embedded INTEGER NOT NULL DEFAULT 0,
    created INTEGER NOT NULL, UNIQUE (base, name));
CREATE INDEX files_by_hash ON files (sha256);
CREATE INDEX files_by_id ON files (base, id);
"""
_FILE = (
    "SELECT number, base, name, id, sha256, size, status, error, code, chunks, embedded, created"
    " FROM files"
)


class IngestError(NamedTuple):
    """Why a file, or a part of it, or a knowledge base cannot be used."""

    code: Code
    message: str


@dataclass(frozen=True)
class BaseRow:
    name: str
    embedder: str | None  # its name on this server
    created: int
    deleting: bool


@dataclass(frozen=True)
class FileRow:
    """`id` identifies these bytes under this name in this base, `number` one upload of them.
    chunks, embedded: set when it is ready."""

    number: int
    base: str
    name: str
    id: str
    sha256: str
    size: int
    status: Status
    error: str | None
    code: Code | None
    chunks: int
    embedded: int
    created: int


class Catalogue:
    """Thread-safe; every method is atomic.

    Raises `ConfigError` where another process has it open, or it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        busy = f"{path.parent} is in use by another khaosz serve"
        self.check(path)
        with _errors(), database_errors(path, busy=busy):
            self._db = open_database(path, timeout=0, durable=True, exclusive=True, any_thread=True)
            with close_on_error(self._db):
                require_version(self._db, path, VERSION, _SCHEMA, _UPGRADES)

    @staticmethod
    def check(path: Path) -> None:
        """Raise the `ConfigError` for a file of another program, without changing it."""
        with _errors(), database_errors(path):
            examine(path, VERSION, _SCHEMA, upgrades=_UPGRADES)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, transaction(self._db):
            yield

    def _change(self, statement: str, *values: object) -> bool:
        """Whether it changed a row."""
        with self._writing():
            return self._db.execute(statement, values).rowcount > 0

    def _files(self, condition: str, *values: object) -> list[FileRow]:
        with self._lock:
            rows = self._db.execute(f"{_FILE} WHERE {condition}", values).fetchall()
        return [FileRow(*row) for row in rows]

    def _file(self, condition: str, *values: object) -> FileRow | None:
        return next(iter(self._files(f"{condition} LIMIT 1", *values)), None)

    # --------------------------------------------------------------------------------------- bases

    def bases(self) -> list[BaseRow]:
        """Sorted by name, with those that are being deleted."""
        with self._lock:
            rows = self._db.execute(
                "SELECT name, embedder, created, deleting FROM bases"
            ).fetchall()
        rows.sort(key=lambda row: natural_key(row[0]))
        return [BaseRow(name, embedder, at, bool(gone)) for name, embedder, at, gone in rows]

    def add_base(self, name: str, embedder: str | None) -> BaseRow | None:
        """None if the name is taken. Names that differ in case only are the same, as they are in
        some file systems."""
        row = BaseRow(name, embedder, int(time.time()), False)
        try:
            with self._writing():
                self._db.execute(
                    "INSERT INTO bases (key, name, embedder, created) VALUES (?,?,?,?)",
                    (unicodedata.normalize("NFKC", name).casefold(), name, embedder, row.created),
                )
        except sqlite3.IntegrityError:
            return None
        return row

    def mark_deleting(self, name: str) -> bool:
        """Delete its files, and mark it. Returns False if it does not exist."""
        with self._writing():
            self._db.execute("DELETE FROM files WHERE base = ?", (name,))
            marked = self._db.execute(
                "UPDATE bases SET deleting = 1 WHERE name = ? AND NOT deleting", (name,)
            )
            return marked.rowcount > 0

    def drop_base(self, name: str) -> None:
        with self._writing():
            self._db.execute("DELETE FROM files WHERE base = ?", (name,))
            self._db.execute("DELETE FROM bases WHERE name = ?", (name,))

    # --------------------------------------------------------------------------------------- files

    def files(self, base: str, *, removed: bool = False) -> list[FileRow]:
        """In the order of upload."""
        condition = "base = ? AND (? OR status != 'removed') ORDER BY number"
        return self._files(condition, base, removed)

    def file(self, base: str, file_id: str) -> FileRow | None:
        return self._file("base = ? AND id = ? AND status != 'removed'", base, file_id)

    def put(self, base: str, name: str, sha256: str, size: int) -> FileRow | None:
        """Queue a file; it replaces the one of that name. The same bytes under the same name stay
        as they are, unless reading them failed. None if the base does not exist."""
        file_id = "file-" + hashlib.sha256(f"{name}\0{sha256}".encode()).hexdigest()[:32]
        with self._writing():
            exists = self._db.execute(
                "SELECT 1 FROM bases WHERE name = ? AND NOT deleting", (base,)
            ).fetchone()
            if exists is None:
                return None
            known = self._file(
                "base = ? AND id = ? AND status NOT IN ('failed', 'removed')", base, file_id
            )
            if known is not None:
                return known
            self._db.execute(
                "INSERT OR REPLACE INTO files (base, name, id, sha256, size, status, created)"
                " VALUES (?,?,?,?,?,'queued',?)",
                (base, name, file_id, sha256, size, int(time.time())),
            )
            return self._file("base = ? AND id = ?", base, file_id)

    def next_job(self, base: str) -> FileRow | None:
        """The next file to process: removals first, then uploads in their order."""
        return self._file(
            "base = ? AND status IN ('removed', 'queued') ORDER BY status = 'queued', number", base
        )

    def is_still(self, status: Status, row: FileRow) -> bool:
        """Whether it has this status, and was not removed or replaced meanwhile."""
        return self._file("number = ? AND status = ?", row.number, status) is not None

    def settle(
        self,
        row: FileRow,
        status: Status,
        error: IngestError | None,
        chunks: int = 0,
        embedded: int = 0,
    ) -> bool:
        """Store the result of a queued file; False if it was removed or replaced meanwhile."""
        code, message = error or (None, None)
        return self._change(
            "UPDATE files SET status = ?, error = ?, code = ?, chunks = ?, embedded = ?"
            " WHERE number = ? AND status = 'queued'",
            *(status, message, code, chunks, embedded, row.number),
        )

    def queue_again(self, row: FileRow) -> None:
        """A file that the base turns out to lack."""
        self._change(
            "UPDATE files SET status = 'queued', error = NULL, code = NULL"
            " WHERE number = ? AND status = 'ready'",
            row.number,
        )

    def mark_removed(self, row: FileRow) -> bool:
        return self._change(
            "UPDATE files SET status = 'removed' WHERE number = ? AND status != 'removed'",
            row.number,
        )

    def forget(self, row: FileRow) -> None:
        """Delete a removed file, once its document is out of the base."""
        self._change("DELETE FROM files WHERE number = ? AND status = 'removed'", row.number)

    def uploads(self) -> set[str]:
        """The hashes of all files."""
        with self._lock:
            rows = self._db.execute("SELECT DISTINCT sha256 FROM files WHERE status != 'removed'")
            return {row[0] for row in rows}

    def is_used(self, sha256: str) -> bool:
        return self._file("sha256 = ? AND status != 'removed'", sha256) is not None


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise ConfigError(str(error), hint="choose another --data") from error
