"""Conversations in one SQLite file.

    conversations     title, times, revision, and everything else as JSON in the last column
    texts             messages and titles, case-folded, for search
    generations       answers that this server generates, by the id of their message (see
                      `khaosz.serve.generations.store`)
    generation_parts  their texts, as they grow

One writer and any number of readers at once (WAL). What was written is on the disk before the
answer says so (synchronous = FULL), and there whole or not at all.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from khaosz.database import (
    close_on_error,
    database_errors,
    examine,
    is_busy,
    open_database,
    require_version,
    transaction,
)
from khaosz.serve.errors import ApiError, map_disk_full
from khaosz.serve.replies import Reply

VERSION = 2
_BUSY_S = 10.0  # a writer waits for one of another process
_HINT = "move it away, or choose another --data"
_AROUND = 40  # characters of a snippet before and after the match
_COLUMNS = "id, title, created, updated, messages, revision"
_GENERATIONS = """
CREATE TABLE generations (
    id TEXT PRIMARY KEY, conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE,
    number INTEGER NOT NULL UNIQUE, state TEXT NOT NULL, head TEXT NOT NULL, tail TEXT NOT NULL,
    resume TEXT);
CREATE INDEX generations_by_conversation ON generations (conversation, number);
CREATE TABLE generation_parts (
    generation TEXT NOT NULL REFERENCES generations ON DELETE CASCADE, at INTEGER NOT NULL,
    reasoning TEXT NOT NULL, content TEXT NOT NULL, raw TEXT NOT NULL,
    PRIMARY KEY (generation, at)) WITHOUT ROWID;
"""
_UPGRADES = {1: _GENERATIONS}
_SCHEMA = f"""
CREATE TABLE conversations (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL,
    messages INTEGER NOT NULL, revision INTEGER NOT NULL, written INTEGER NOT NULL UNIQUE,
    body TEXT NOT NULL);
CREATE INDEX conversations_by_time ON conversations (updated, written);
CREATE TABLE texts (
    conversation TEXT NOT NULL REFERENCES conversations ON DELETE CASCADE, at INTEGER NOT NULL,
    folded TEXT NOT NULL, PRIMARY KEY (conversation, at)) WITHOUT ROWID;
{_GENERATIONS.strip()}
"""


class ConversationSummary(Reply):
    """`messages` counts all branches; `snippet`: the text around the match of a search."""

    object: Literal["conversation"]
    id: str
    title: str
    created: int
    updated: int
    messages: int
    revision: int
    snippet: str | None = None


@dataclass(frozen=True)
class Entry:
    """A conversation to write. `body` contains `nodes`, whose texts are searched; the times are set
    for imports."""

    id: str
    title: str
    body: dict[str, Any]
    created: int | None = None
    updated: int | None = None


class _Folds(dict[int, str]):
    """Characters without case and width: Ａ, A and a are equal."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = unicodedata.normalize("NFKC", chr(code)).casefold()
        return folded


_FOLDS = _Folds()


def folded(text: str) -> str:
    # Character by character, so that `_snippet` can map positions back.
    return text.lower() if text.isascii() else text.translate(_FOLDS)


class ConversationStore:
    """Thread-safe. Raises `DataError` for a file that is not such a database, is damaged or has a
    later version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.check(path)
        with database_errors(path, hint=_HINT):
            self._writer = self._connect()
            with close_on_error(self._writer):
                require_version(self._writer, path, VERSION, _SCHEMA, _UPGRADES)

    @staticmethod
    def check(path: Path) -> None:
        """Raise the `DataError` for a file of another program, without changing it."""
        with database_errors(path, hint=_HINT):
            examine(path, VERSION, _SCHEMA, upgrades=_UPGRADES)

    def _connect(self) -> sqlite3.Connection:
        return open_database(self.path, timeout=_BUSY_S, durable=True, any_thread=True)

    def close(self) -> None:
        with self._lock:
            self._writer.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction. Raises `ApiError` for a full disk and a locked file."""
        with self._lock, map_disk_full():
            try:
                with transaction(self._writer):
                    yield self._writer
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                message = f"another program is writing to {self.path.name}"
                raise ApiError(503, message, code="file_busy") from None

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        # Its own connection, which costs 0.1 ms and waits for no other. The writer's stays open, so
        # closing this one is never the last and writes nothing.
        with closing(self._connect()) as db:
            db.execute("BEGIN")
            yield db

    # --------------------------------------------------------------------------------------- write

    def put(self, entry: Entry, revision: int | None = None) -> ConversationSummary:
        """Create or replace a conversation. `revision`: the expected one, 0 if it is new, None for
        any. Raises `ApiError` for another revision, unless the content is equal: then the response
        to an earlier request was lost."""
        with self.writing() as db:
            row = find_row(db, entry.id)
            now = 0 if row is None else row[5]
            if revision not in (None, now):
                if row and (row[1], row[6]) == (entry.title, _dumped(entry.body)):
                    return _summary(row)
                raise ApiError(
                    409,
                    f"the conversation is at revision {now}, not {revision}",
                    param="revision",
                    code="revision_conflict",
                )
            return write_entry(db, entry)

    def put_all(self, entries: Sequence[Entry]) -> None:
        """Create or replace all of them, or none."""
        with self.writing() as db:
            for entry in entries:
                write_entry(db, entry)

    def delete(self, id: str) -> None:
        with self.writing() as db:
            if not db.execute("DELETE FROM conversations WHERE id = ?", (id,)).rowcount:
                raise _not_found()

    # ---------------------------------------------------------------------------------------- read

    def get(self, id: str) -> dict[str, Any]:
        with self.reading() as db:
            row = find_row(db, id)
        if row is None:
            raise _not_found()
        return {**_summary(row).model_dump(exclude_unset=True), **json.loads(row[6])}

    def ids(self) -> list[str]:
        """Sorted by time of change, the latest last."""
        with self.reading() as db:
            rows = db.execute("SELECT id FROM conversations ORDER BY updated, written")
            return [row[0] for row in rows]

    def page(
        self, query: str = "", limit: int = 50, after: str | None = None
    ) -> tuple[list[ConversationSummary], bool]:
        """Newest first, starting after the conversation `after`; and whether there are more."""
        with self.reading() as db:
            start: tuple[int, int] = (1 << 62, 0)
            if after is not None:
                start = db.execute(
                    "SELECT updated, written FROM conversations WHERE id = ?", (after,)
                ).fetchone()
                if start is None:
                    raise _not_found("after")
            needle = folded(query)
            # A full scan: an index cannot find single characters within words. `instr`, not LIKE:
            # queries have no wildcards.
            match = (
                "(SELECT at FROM texts WHERE conversation = id AND instr(folded, :needle)"
                " ORDER BY at LIMIT 1)"
            )
            rows = db.execute(
                f"SELECT {_COLUMNS}, {match if needle else 0} AS found FROM conversations"
                " WHERE (updated, written) < (:updated, :written) AND found IS NOT NULL"
                " ORDER BY updated DESC, written DESC LIMIT :limit",
                {"needle": needle, "updated": start[0], "written": start[1], "limit": limit + 1},
            ).fetchall()
            summaries = []
            for *columns, at in rows[:limit]:
                summary = _summary(columns)
                if needle:
                    text = summary.title if at == summary.messages else _text(db, summary.id, at)
                    summary.snippet = _snippet(text, needle)
                summaries.append(summary)
        return summaries, len(rows) > limit


def write_entry(db: sqlite3.Connection, entry: Entry) -> ConversationSummary:
    """Inside `ConversationStore.writing`. Generations of messages that are gone go too."""
    now = int(time.time())
    row = db.execute(
        "SELECT created, revision FROM conversations WHERE id = ?", (entry.id,)
    ).fetchone()
    created, revision = row or (now, 0)
    texts = [node["content"] for node in entry.body["nodes"]]
    created = created if entry.created is None else entry.created
    updated = now if entry.updated is None else entry.updated
    columns = (entry.id, entry.title, created, updated, len(texts), revision + 1)
    # Replaced in place: deleting the row would delete its generations.
    db.execute(
        f"INSERT INTO conversations ({_COLUMNS}, written, body) VALUES (?,?,?,?,?,?,"
        " (SELECT coalesce(max(written), 0) + 1 FROM conversations), ?) ON CONFLICT (id) DO UPDATE"
        " SET title = excluded.title, created = excluded.created, updated = excluded.updated,"
        " messages = excluded.messages, revision = excluded.revision, written = excluded.written,"
        " body = excluded.body",
        (*columns, _dumped(entry.body)),
    )
    messages = {node.get("id") for node in entry.body["nodes"]}
    generations = db.execute("SELECT id FROM generations WHERE conversation = ?", (entry.id,))
    gone = [(id,) for (id,) in generations if id not in messages]
    db.executemany("DELETE FROM generations WHERE id = ?", gone)
    db.execute("DELETE FROM texts WHERE conversation = ?", (entry.id,))
    # The title last: a message with the same words is the better snippet.
    db.executemany(
        "INSERT INTO texts VALUES (?,?,?)",
        [(entry.id, at, folded(text)) for at, text in enumerate([*texts, entry.title])],
    )
    return _summary(columns)


def _summary(row: Sequence[Any]) -> ConversationSummary:
    """Of a row that starts with `_COLUMNS`."""
    columns = dict(zip(_COLUMNS.split(", "), row, strict=False))
    return ConversationSummary(object="conversation", **columns)


def _text(db: sqlite3.Connection, id: str, at: int) -> str:
    # Not SQLite's JSON functions, which end a text at a NUL.
    text: str = json.loads(find_row(db, id)[6])["nodes"][at]["content"]
    return text


def find_row(db: sqlite3.Connection, id: str) -> Any:
    """`_COLUMNS` and the body; None if it does not exist."""
    query = f"SELECT {_COLUMNS}, body FROM conversations WHERE id = ?"
    return db.execute(query, (id,)).fetchone()


def _dumped(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def _snippet(text: str, needle: str) -> str:
    """The text around the first match of `needle`, with white space collapsed."""
    match = folded(text).index(needle)
    start = end = at = 0
    for i, character in enumerate(text):
        if at <= match:
            start = i
        if at >= match + len(needle):
            break
        at += len(folded(character))
        end = i + 1
    first, last = max(0, start - _AROUND), end + _AROUND
    around = " ".join(text[first:last].split())
    return f"{'…' if first else ''}{around}{'…' if last < len(text) else ''}"


def _not_found(param: str | None = None) -> ApiError:
    return ApiError(404, "conversation not found", param=param)
