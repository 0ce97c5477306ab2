"""A knowledge base in one SQLite file: the truth, from which every index can be made again.

    sources     a file that was added: path, size, time, hash     (what need not be read again)
    documents   name, hash of the text, pages, metadata           (one or more of a source)
    chunks      start, end, text, heading path, terms             (they cover their document)
    vectors     float32 of a chunk
    terms       in how many chunks a term stands
    postings    FTS5 without positions, fed with our own terms: which chunks a term stands in

One writer and any number of readers at once (WAL). What is in one `with store.writing()` is there
whole or not at all, after a crash too.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from khaosz.errors import DataError
from khaosz.rag.store.protocol import (
    Counted,
    NewChunk,
    NewDocument,
    SourceFile,
    StoredChunk,
    StoredDocument,
    whole_text,
)
from khaosz.rag.terms import terms

VERSION = 1
_BUSY_S = 30.0  # a writer waits for another one
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


class SqliteStore(Counted):
    """Raises `DataError` for a file that is no knowledge base, is broken or of a later version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._create()
            found = self.get("version")
        except (sqlite3.DatabaseError, OSError) as error:
            raise DataError(
                f"{path} cannot be used as a knowledge base: {error}",
                hint="name another file, or `khaosz rag reindex` from its documents",
            ) from error
        if found != str(VERSION):
            raise DataError(f"{path} has version {found} of the layout, this program {VERSION}")

    def _create(self) -> None:
        with self.writing():
            # Another process may have been first.
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self.set("version", str(VERSION))

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction; another writer is waited for. Raises `DataError`, and nothing is
        changed, when the disk is full or the file cannot be written."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:  # whatever was raised; a full disk may have rolled back already
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            raise DataError(
                f"{self.path}: {error}", hint="is the disk full, or read-only?"
            ) from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """All reads inside see one state of the base, whatever is written meanwhile."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    # ---------------------------------------------------------------------------------------- meta

    def get(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def set(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def unset(self, key: str) -> None:
        self._db.execute("DELETE FROM meta WHERE key = ?", (key,))

    def settings(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT key, value FROM meta"))

    def _count(self, key: str, by: int) -> None:
        self.set(key, str(int(self.get(key) or 0) + by))

    # --------------------------------------------------------------------------------------- write

    def replace(
        self, collection: str, source: SourceFile, documents: Sequence[NewDocument]
    ) -> None:
        """Put a file's documents where its former ones were. Inside `writing`."""
        self.remove_source(collection, source.path)
        add = self._db.execute
        number = add(
            "INSERT INTO sources (collection, path, size, mtime_ns, sha256) VALUES (?,?,?,?,?)",
            (collection, source.path, source.size, source.mtime_ns, source.sha256),
        ).lastrowid
        frequency: Counter[str] = Counter()
        chunks = total = 0
        for document in documents:
            owner = add(
                "INSERT INTO documents (source, collection, doc_id, name, hash, length, pages,"
                " metadata) VALUES (?,?,?,?,?,?,?,?)",
                (
                    *(number, collection, document.doc_id, document.name, document.hash),
                    *(document.length, json.dumps(document.pages)),
                    json.dumps(document.metadata, ensure_ascii=False),
                ),
            ).lastrowid
            for chunk in document.chunks:
                found = terms(chunk.indexed)
                distinct = set(found)
                frequency.update(distinct)
                total += len(found)
                chunks += 1
                headings = json.dumps(chunk.headings, ensure_ascii=False)
                row = add(
                    'INSERT INTO chunks (document, start, "end", text, headings, terms)'
                    " VALUES (?,?,?,?,?,?)",
                    (owner, chunk.start, chunk.end, chunk.text, headings, len(found)),
                ).lastrowid
                add("INSERT INTO postings (rowid, terms) VALUES (?,?)", (row, " ".join(distinct)))
                if chunk.vector is not None:
                    add("INSERT INTO vectors VALUES (?,?)", (row, _packed(chunk.vector)))
        self._count_terms(frequency)
        self._count("chunks", chunks)
        self._count("terms", total)
        self._count("generation", 1)

    def _count_terms(self, frequency: Counter[str], sign: int = 1) -> None:
        self._db.executemany(
            "INSERT INTO terms VALUES (?1, ?2)"
            " ON CONFLICT (term) DO UPDATE SET chunks = chunks + ?2",
            [(term, sign * count) for term, count in frequency.items()],
        )

    def touch(self, collection: str, source: SourceFile) -> None:
        """The same bytes with another time. Inside `writing`."""
        self._db.execute(
            "UPDATE sources SET size = ?, mtime_ns = ? WHERE collection = ? AND path = ?",
            (source.size, source.mtime_ns, collection, source.path),
        )

    def remove_source(self, collection: str, path: str) -> bool:
        """Whether it was there. Inside `writing`."""
        row = self._db.execute(
            "SELECT id FROM sources WHERE collection = ? AND path = ?", (collection, path)
        ).fetchone()
        if row is None:
            return False
        frequency: Counter[str] = Counter()
        chunks = total = 0
        owned = self._db.execute(
            "SELECT c.id, c.text, c.headings, c.terms FROM chunks c JOIN documents d"
            " ON c.document = d.id WHERE d.source = ?",
            row,
        ).fetchall()
        for number, text, headings, length in owned:
            # FTS5 without contents forgets a row when it is told what stood in it.
            distinct = set(terms(NewChunk(0, 0, text, tuple(json.loads(headings))).indexed))
            self._db.execute(
                "INSERT INTO postings (postings, rowid, terms) VALUES ('delete', ?, ?)",
                (number, " ".join(distinct)),
            )
            frequency.update(distinct)
            chunks += 1
            total += length
        self._count_terms(frequency, -1)
        self._db.execute("DELETE FROM sources WHERE id = ?", row)
        self._count("chunks", -chunks)
        self._count("terms", -total)
        self._count("generation", 1)
        return True

    def rebuild_postings(self) -> None:
        """Lexical search made again from the chunks. Inside `writing`."""
        self._db.execute("INSERT INTO postings (postings) VALUES ('delete-all')")
        self._db.execute("DELETE FROM terms")
        frequency: Counter[str] = Counter()
        chunks = total = 0
        for number, text, headings in self._db.execute("SELECT id, text, headings FROM chunks"):
            found = terms(NewChunk(0, 0, text, tuple(json.loads(headings))).indexed)
            distinct = set(found)
            frequency.update(distinct)
            total += len(found)
            chunks += 1
            self._db.execute("UPDATE chunks SET terms = ? WHERE id = ?", (len(found), number))
            self._db.execute(
                "INSERT INTO postings (rowid, terms) VALUES (?,?)", (number, " ".join(distinct))
            )
        self._count_terms(frequency)
        self.set("chunks", str(chunks))
        self.set("terms", str(total))
        self._count("generation", 1)

    def set_vectors(self, vectors: Iterable[tuple[int, np.ndarray]]) -> None:
        """Of chunks, by their numbers. Inside `writing`."""
        self._db.executemany(
            "INSERT OR REPLACE INTO vectors VALUES (?,?)",
            ((number, _packed(vector)) for number, vector in vectors),
        )
        self._count("generation", 1)

    def forget_vectors(self) -> None:
        self._db.execute("DELETE FROM vectors")
        self._count("generation", 1)

    # ---------------------------------------------------------------------------------------- read

    def source(self, collection: str, path: str) -> SourceFile | None:
        row = self._db.execute(
            "SELECT path, size, mtime_ns, sha256 FROM sources WHERE collection = ? AND path = ?",
            (collection, path),
        ).fetchone()
        return None if row is None else SourceFile(*row)

    def source_paths(self, collection: str) -> list[str]:
        rows = self._db.execute("SELECT path FROM sources WHERE collection = ?", (collection,))
        return [row[0] for row in rows]

    def sources(self) -> Iterator[tuple[str, SourceFile]]:
        rows = self._db.execute(
            "SELECT collection, path, size, mtime_ns, sha256 FROM sources ORDER BY id"
        )
        for collection, *file in rows:
            yield collection, SourceFile(*file)

    def contents(self, collection: str, path: str) -> list[NewDocument]:
        rows = self._db.execute(
            _DOCUMENT + " WHERE s.collection = ? AND s.path = ? ORDER BY d.id", (collection, path)
        ).fetchall()
        return [self._content(_document(row)) for row in rows]

    def _content(self, document: StoredDocument) -> NewDocument:
        rows = self._db.execute(
            'SELECT c.start, c."end", c.text, c.headings, v.vector FROM chunks c'
            " LEFT JOIN vectors v ON v.chunk = c.id WHERE c.document = ? ORDER BY c.id",
            (document.id,),
        )
        chunks = [
            NewChunk(
                *(start, end, text, tuple(json.loads(headings))),
                None if raw is None else np.frombuffer(raw, np.float32),
            )
            for start, end, text, headings, raw in rows
        ]
        return document.with_chunks(chunks)

    def counts(self) -> dict[str, int]:
        # A term that stands nowhere any more may keep its row.
        tables = ("sources", "documents", "chunks", "vectors", "terms WHERE chunks > 0")
        return {
            table.split()[0]: int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
            for table in tables
        }

    def size(self) -> int:
        return self.path.stat().st_size

    def documents(self, collection: str | None = None) -> list[StoredDocument]:
        where, values = (
            ("", ()) if collection is None else (" WHERE d.collection = ?", (collection,))
        )
        rows = self._db.execute(_DOCUMENT + where + " ORDER BY d.collection, d.name, d.id", values)
        return [_document(row) for row in rows]

    def owners(self, numbers: Sequence[int]) -> dict[int, StoredDocument]:
        found = {}
        for number in set(numbers):
            row = self._db.execute(_DOCUMENT + " WHERE d.id = ?", (number,)).fetchone()
            if row is not None:
                found[number] = _document(row)
        return found

    def document_by_hash(self, digest: str) -> StoredDocument | None:
        row = self._db.execute(_DOCUMENT + " WHERE d.hash = ? LIMIT 1", (digest,)).fetchone()
        return None if row is None else _document(row)

    def text(self, document: int) -> str:
        return whole_text(self.chunks_of(document))

    def chunks(self, numbers: Sequence[int]) -> list[StoredChunk]:
        """In the order asked for; those that are gone are left out."""
        rows = {}
        for first in range(0, len(numbers), 500):
            some = list(map(int, numbers[first : first + 500]))
            marks = ",".join("?" * len(some))
            for row in self._db.execute(f"{_CHUNK} WHERE id IN ({marks})", some):
                rows[row[0]] = row
        return [_chunk(rows[number]) for number in map(int, numbers) if number in rows]

    def chunks_of(self, document: int) -> list[StoredChunk]:
        rows = self._db.execute(_CHUNK + " WHERE document = ? ORDER BY start", (document,))
        return [_chunk(row) for row in rows]

    def chunk_numbers(
        self, *, collection: str | None = None, name: str | None = None
    ) -> np.ndarray:
        """int64 numbers of the chunks of a collection, of documents whose name fits a GLOB."""
        clauses = {"d.collection = ?": collection, "d.name GLOB ?": name}
        used = {clause: value for clause, value in clauses.items() if value is not None}
        rows = self._db.execute(
            "SELECT c.id FROM chunks c JOIN documents d ON c.document = d.id WHERE "
            + (" AND ".join(used) or "1"),
            tuple(used.values()),
        )
        return np.fromiter((row[0] for row in rows), np.int64)

    def unembedded(self) -> Iterator[StoredChunk]:
        for row in self._db.execute(_CHUNK + " WHERE id NOT IN (SELECT chunk FROM vectors)"):
            yield _chunk(row)

    @property
    def vector_count(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM vectors").fetchone()[0])

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 chunk numbers (N,) and float32 vectors (N, D)."""
        count = self.vector_count
        numbers, matrix = np.empty(count, np.int64), np.empty((count, self.dimension), np.float32)
        at = 0
        for some, rows in self.vector_blocks():
            numbers[at : at + len(some)], matrix[at : at + len(some)] = some, rows
            at += len(some)
        return numbers, matrix

    def vector_blocks(self, size: int = 10_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same in parts of at most `size`, for what need not hold all of them at once."""
        found = self._db.execute("SELECT chunk, vector FROM vectors ORDER BY chunk")
        while rows := found.fetchmany(size):
            raw = b"".join(vector for _, vector in rows)
            matrix = np.frombuffer(raw, np.float32).reshape(len(rows), self.dimension)
            yield np.array([number for number, _ in rows], np.int64), matrix

    def document_frequencies(self, wanted: Sequence[str]) -> dict[str, int]:
        marks = ",".join("?" * len(wanted))
        rows = self._db.execute(f"SELECT term, chunks FROM terms WHERE term IN ({marks})", wanted)
        return {term: count for term, count in rows if count > 0}

    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        query = "SELECT rowid FROM postings WHERE postings MATCH ?"
        rows = (self._db.execute(query, (f'"{term}"',)).fetchall() for term in wanted)
        return [np.array(found, np.int64).reshape(-1) for found in rows]


_DOCUMENT = (
    "SELECT d.id, d.collection, d.doc_id, d.name, d.hash, d.length, d.pages, d.metadata, s.path"
    " FROM documents d JOIN sources s ON d.source = s.id"
)
_CHUNK = 'SELECT id, document, start, "end", text, headings, terms FROM chunks'


def _document(row: tuple) -> StoredDocument:
    number, collection, doc_id, name, digest, length, pages, metadata, path = row
    return StoredDocument(
        *(number, collection, doc_id, name, digest, length),
        *(tuple(json.loads(pages)), json.loads(metadata), path),
    )


def _chunk(row: tuple) -> StoredChunk:
    number, document, start, end, text, headings, count = row
    # Most chunks of most bases have none, and a search looks at hundreds.
    path = () if headings == "[]" else tuple(json.loads(headings))
    return StoredChunk(number, document, start, end, text, path, count)


def _packed(vector: np.ndarray) -> bytes:
    return np.ascontiguousarray(vector, np.float32).tobytes()
