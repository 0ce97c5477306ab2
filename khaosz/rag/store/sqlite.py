"""A knowledge base in one SQLite file, from which every index can be rebuilt.

The tables are those of `sql.py`; the index from terms to chunks is an FTS5 table without positions,
fed with our own terms.

One writer and any number of readers at once (WAL). The changes inside one `with store.writing()`
are atomic, also after a crash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.database import (
    close_on_error,
    database_errors,
    examine,
    is_empty,
    open_database,
    run_script,
    transaction,
)
from khaosz.errors import DataError
from khaosz.files import disk_error
from khaosz.rag.store.records import SourceFile, indexed_text
from khaosz.rag.store.sql import VERSION, Store
from khaosz.rag.terms import terms

_BUSY_S = 30.0  # a writer waits for another one
_VARIABLES = 500  # of one statement
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sources (
    id INTEGER PRIMARY KEY, collection TEXT NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL, UNIQUE (collection, path));
CREATE TABLE documents (
    id INTEGER PRIMARY KEY, source INTEGER NOT NULL REFERENCES sources ON DELETE CASCADE,
    collection TEXT NOT NULL, doc_id TEXT NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL,
    length INTEGER NOT NULL, pages TEXT NOT NULL, metadata TEXT NOT NULL);
CREATE INDEX documents_of_source ON documents (source);
CREATE INDEX documents_of_collection ON documents (collection, doc_id);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
    start INTEGER NOT NULL, "end" INTEGER NOT NULL, text TEXT NOT NULL, headings TEXT NOT NULL,
    terms INTEGER NOT NULL);
CREATE INDEX chunks_of_document ON chunks (document, start);
CREATE TABLE vectors (chunk INTEGER PRIMARY KEY REFERENCES chunks ON DELETE CASCADE,
    vector BLOB NOT NULL);
CREATE TABLE terms (term TEXT PRIMARY KEY, chunks INTEGER NOT NULL) WITHOUT ROWID;
CREATE VIRTUAL TABLE postings USING fts5(
    terms, content='', detail=none, columnsize=0, tokenize="unicode61 remove_diacritics 0");
"""


class SqliteStore(Store):
    """Raises `DataError` for a file that is not a knowledge base, is damaged or of a later
    version."""

    _by_source = "s.collection = ? AND s.path = ?"
    _by_name = "d.name GLOB ?"

    def __init__(self, path: Path, *, new: bool = True) -> None:
        self.path = path
        self.where = str(path)
        hint = "name another file"
        try:
            if new:
                path.parent.mkdir(parents=True, exist_ok=True)
            elif path.is_file() and not path.stat().st_size:
                raise DataError(f"{path} is empty, not a knowledge base", hint=hint)
        except OSError as error:
            raise DataError(f"{path} cannot be used: {disk_error(error)}", hint=hint) from error
        with database_errors(path, hint=hint):
            examine(
                *(path, VERSION, _SCHEMA),
                version_query="SELECT value FROM meta WHERE key = 'version'",
            )
            self._db = open_database(path, timeout=_BUSY_S, durable=False)
            with close_on_error(self._db):
                if is_empty(self._db):
                    self._create()
                self._check_version()

    def _create(self) -> None:
        with self.writing():
            if is_empty(self._db):  # another process may have created it first
                run_script(self._db, _SCHEMA)
                self.set("version", VERSION)

    def close(self) -> None:
        self._db.close()

    def size(self) -> int:
        return self.path.stat().st_size

    def _run(self, query: str, values: Sequence[Any] = (), *, binary: bool = False) -> Any:
        return self._db.execute(query, values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with database_errors(self.path), transaction(self._db):
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        if self._db.in_transaction:
            yield
            return
        with database_errors(self.path):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("COMMIT")

    # --------------------------------------------------------------------------------------- write

    def _source_key(self, collection: str, path: str) -> tuple[str, ...]:
        return collection, path

    def _name_pattern(self, glob: str) -> str:
        return glob

    def _insert_source(self, number: int, collection: str, source: SourceFile) -> None:
        self._run(
            "INSERT INTO sources VALUES (?,?,?,?,?,?)",
            (number, collection, source.path, source.size, source.mtime_ns, source.sha256),
        )

    def _insert_documents(self, rows: Sequence[tuple]) -> None:
        self._db.executemany("INSERT INTO documents VALUES (?,?,?,?,?,?,?,?,?)", rows)

    def _insert_chunks(self, rows: Sequence[tuple]) -> None:
        self._db.executemany(
            "INSERT INTO chunks VALUES (?,?,?,?,?,?,?)", (columns for *columns, _ in rows)
        )
        self._insert_postings((row[0], row[-1]) for row in rows)

    def _insert_postings(self, rows: Iterable[tuple[int, Iterable[str]]]) -> None:
        self._db.executemany(
            "INSERT INTO postings (rowid, terms) VALUES (?,?)",
            ((number, " ".join(distinct)) for number, distinct in rows),
        )

    def _put_vectors(self, vectors: Sequence[tuple[int, np.ndarray]]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO vectors VALUES (?,?)",
            (
                (number, np.ascontiguousarray(vector, np.float32).tobytes())
                for number, vector in vectors
            ),
        )

    def _remove_postings(self, source: int) -> Iterator[tuple[int, Iterable[str]]]:
        rows = self._run(
            "SELECT c.id, c.text, c.headings, c.terms FROM chunks c JOIN documents d"
            " ON c.document = d.id WHERE d.source = ?",
            (source,),
        ).fetchall()
        for number, text, headings, occurrences in rows:
            # FTS5 without contents removes a row only when given the terms that were in it.
            distinct = set(terms(indexed_text(json.loads(headings), text)))
            self._run(
                "INSERT INTO postings (postings, rowid, terms) VALUES ('delete', ?, ?)",
                (number, " ".join(distinct)),
            )
            yield occurrences, distinct

    def rebuild_postings(self) -> None:
        self._run("INSERT INTO postings (postings) VALUES ('delete-all')")
        super().rebuild_postings()

    def _replace_postings(self, rows: Sequence[tuple[int, int, list[str]]]) -> None:
        self._db.executemany(
            "UPDATE chunks SET terms = ? WHERE id = ?",
            ((occurrences, number) for number, occurrences, _ in rows),
        )
        self._insert_postings((number, distinct) for number, _, distinct in rows)

    def _add_to_terms(self, changes: Mapping[str, int]) -> None:
        self._db.executemany(
            "INSERT INTO terms VALUES (?1, ?2)"
            " ON CONFLICT (term) DO UPDATE SET chunks = chunks + ?2",
            changes.items(),
        )

    # ---------------------------------------------------------------------------------------- read

    def _matching(self, query: str, column: str, values: Sequence[Any]) -> Iterator[tuple]:
        for first in range(0, len(values), _VARIABLES):
            some = values[first : first + _VARIABLES]
            marks = ",".join("?" * len(some))
            yield from self._run(f"{query} WHERE {column} IN ({marks})", some)

    def _matrix(self, vectors: Sequence[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(vectors), np.float32).reshape(len(vectors), -1)

    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        query = "SELECT rowid FROM postings WHERE postings MATCH ?"
        rows = (self._run(query, (f'"{term}"',)).fetchall() for term in wanted)
        return [np.array(matches, np.int64).reshape(-1) for matches in rows]
