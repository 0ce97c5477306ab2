"""One way to open SQLite, to run a transaction and to report its errors."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

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


# ---- Files of other programs ------------------------------------------------------------------

_CREATED = re.compile(r"CREATE (?:VIRTUAL )?TABLE (\w+)")
_ATTEMPTS = 10  # to read a file that another process is writing to


def examine(
    path: Path,
    version: int | str,
    schema: str,
    *,
    upgrades: Mapping[int, str] | None = None,
    version_query: str = "PRAGMA user_version",
) -> None:
    """Refuse a file that is not a database with the tables of `schema`, before anything is written:
    not to it, and not beside it, as opening a file in WAL mode does. A missing or empty file
    passes. `upgrades` as in `require_version`.

    Raises `DataError` for a database of another program or version, and `sqlite3.DatabaseError`.
    """
    place = Path(os.path.realpath(path))
    for attempt in range(_ATTEMPTS):
        before = _state(place)
        if not any(size for size, _ in before):
            return
        try:
            with _unchanged(place) as db:
                _require_tables(db, path, version, schema, upgrades or {}, version_query)
            return
        except (DataError, sqlite3.DatabaseError, OSError) as error:
            # Another process may have written to it meanwhile.
            if _state(place) != before and attempt + 1 < _ATTEMPTS:
                continue
            if isinstance(error, OSError):
                raise DataError(f"{path} cannot be used: {error.strerror or error}") from error
            raise


def _state(path: Path) -> list[tuple[int, int]]:
    """Size and time of a file and of its WAL; empty where the file does not exist."""
    state = []
    for name in (path, Path(f"{path}-wal")):
        try:
            status = os.stat(name)
        except OSError:
            break
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            raise sqlite3.DatabaseError("it is not a file")
        state.append((status.st_size, status.st_mtime_ns))
    return state


@contextmanager
def _unchanged(path: Path) -> Iterator[sqlite3.Connection]:
    """A database opened such that SQLite creates and changes no file."""
    log = Path(f"{path}-wal")
    with ExitStack() as stack:
        if not log.exists() or not log.stat().st_size:
            yield stack.enter_context(closing(_read_only(path, "immutable=1")))
            return
        if Path(f"{path}-shm").exists():  # a program has it open, or was killed
            db = stack.enter_context(closing(_read_only(path, "readonly_shm=1")))
            readable = False
            with suppress(sqlite3.OperationalError):
                readable = is_empty(db) in (True, False)
            if readable:
                yield db
                return
        # SQLite reads the log only with a -shm beside it: so that of a copy.
        copy = Path(stack.enter_context(TemporaryDirectory()), "copy")
        shutil.copyfile(path, copy)
        shutil.copyfile(log, f"{copy}-wal")
        yield stack.enter_context(closing(sqlite3.connect(copy)))


def _read_only(path: Path, option: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro&{option}", uri=True)


def _require_tables(
    db: sqlite3.Connection,
    path: Path,
    version: int | str,
    schema: str,
    upgrades: Mapping[int, str],
    version_query: str,
) -> None:
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (current,) = db.execute("PRAGMA user_version").fetchone()
    if is_empty(db) and not application and not current:
        return
    later = "".join(script for before, script in upgrades.items() if before >= current)
    names = set(_CREATED.findall(schema)) - set(_CREATED.findall(later))
    if not application and all(_columns(db, name) for name in names):
        row = db.execute(version_query).fetchone()
        current = row and row[0]
        if current in upgrades:
            return
        if current and current != version:
            raise version_error(path, current, version)
        with closing(sqlite3.connect(":memory:")) as ours:
            run_script(ours, schema)
            if current and all(_columns(ours, name) <= _columns(db, name) for name in names):
                return
    raise DataError(
        f"{path} cannot be used: it is a database of another program (layout version"
        f" {current}, not {version})",
        hint="choose another place; nothing was changed",
    )


def _columns(db: sqlite3.Connection, table: str) -> set[str]:
    return {name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", (table,))}


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
