"""One way to open SQLite, to run a transaction and to report its errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from khaosz.errors import DataError


def open_database(
    path: Path,
    *,
    timeout: float,
    durable: bool,
    exclusive: bool = False,
    any_thread: bool = False,
) -> sqlite3.Connection:
    """Open or create a SQLite file in WAL mode, without implicit transactions.

    timeout: seconds to wait for another writer. durable: a commit is on the disk when it returns;
    otherwise a power cut may take the last commits, but never damages the file. exclusive: no other
    process may use the file. any_thread: the caller serialises the threads that share it.

    Raises `sqlite3.DatabaseError`; see `database_errors`.
    """
    db = sqlite3.connect(
        path, timeout=timeout, isolation_level=None, check_same_thread=not any_thread
    )
    with close_on_error(db):
        if exclusive:  # before WAL, which then needs no shared memory and works on network disks
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        db.execute("PRAGMA foreign_keys = ON")
    return db


@contextmanager
def close_on_error(db: sqlite3.Connection) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(db.close)
        yield
        stack.pop_all()


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """One write transaction: committed at the end, rolled back on any exception."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:  # SQLite may have rolled back already, on a full disk
            db.execute("ROLLBACK")


def is_empty(db: sqlite3.Connection) -> bool:
    return not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Statements that end with a semicolon and a line break, inside the open transaction."""
    for statement in script.split(";\n"):
        db.execute(statement)


def require_version(
    db: sqlite3.Connection,
    path: Path,
    version: int,
    schema: str,
    upgrades: Mapping[int, str] | None = None,
) -> None:
    """Create `schema` in an empty file, or upgrade an older one. `upgrades[n]` leads from
    user_version n to n + 1. Raises `DataError` for a file of another version."""
    with transaction(db):
        (current,) = db.execute("PRAGMA user_version").fetchone()
        if current == 0 and is_empty(db):
            run_script(db, schema)
            current = version
        while upgrades and current in upgrades:
            run_script(db, upgrades[current])
            current += 1
        if current != version:
            raise version_error(path, current, version)
        db.execute(f"PRAGMA user_version = {version}")


def version_error(where: Path | str, actual: object, supported: object) -> DataError:
    return DataError(
        f"{where} has layout version {actual}, this program supports {supported}",
        hint="upgrade khaosz, or choose another place",
    )


@contextmanager
def database_errors(
    path: Path, *, busy: str | None = None, hint: str | None = None
) -> Iterator[None]:
    """Raise sqlite3's errors as `DataError`. busy: the message when another process holds the file.
    hint: for a file that is damaged, not a database or cannot be opened."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if is_busy(error):
            raise DataError(busy or f"{path} is in use by another process") from error
        if _code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            raise DataError(
                f"cannot write {path}: {error}",
                hint="check free space and permissions, then run the same command again",
            ) from error
        raise DataError(f"{path} cannot be used: {error}", hint=hint) from error


def is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_full(error: sqlite3.Error) -> bool:
    return _code(error) == sqlite3.SQLITE_FULL


def _code(error: sqlite3.Error) -> int:
    """The primary result code; 0 for errors of Python's module itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
