"""A knowledge base in a schema of a PostgreSQL database, with pgvector.

The tables are those of SQLite's, except that the terms of a chunk stand in an array with a GIN
index, and vectors in a column of pgvector's. The server looks for the nearest: it compares all of
them up to `EXACT_UP_TO`, and goes through an HNSW graph in larger bases.

One writer (an advisory lock of the schema) and any number of readers, on any number of machines.
What is in one `with store.writing()` is there whole or not at all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import psycopg
from psycopg.pq import TransactionStatus

from khaosz.errors import ConfigError, DataError
from khaosz.rag.store.postgres_server import Database, escaped, plain
from khaosz.rag.store.protocol import (
    Counted,
    NewChunk,
    NewDocument,
    SourceFile,
    StoredChunk,
    StoredDocument,
    glob_pattern,
    key_of,
    whole_text,
)
from khaosz.rag.terms import terms

VERSION = "1"
EXACT_UP_TO = 10_000  # vectors
LONGEST_INDEXED = 2000  # dimensions that pgvector's HNSW takes
_BUSY = "30s"  # a writer waits for another one
_SCAN = 200_000  # vectors the graph goes through for those a filter lets pass
_READ = 5000  # chunks read at once
_SCHEMA = """
CREATE TABLE meta (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE sources (
    id bigint PRIMARY KEY, key text NOT NULL UNIQUE, collection text COLLATE "C" NOT NULL,
    path text NOT NULL, size bigint NOT NULL, mtime_ns bigint NOT NULL, sha256 text NOT NULL);
CREATE TABLE documents (
    id bigint PRIMARY KEY, source bigint NOT NULL REFERENCES sources ON DELETE CASCADE,
    collection text COLLATE "C" NOT NULL, doc_id text NOT NULL, name text COLLATE "C" NOT NULL,
    hash text NOT NULL, length bigint NOT NULL, pages text NOT NULL, metadata text NOT NULL);
CREATE INDEX ON documents (source);
CREATE INDEX ON documents (collection);
CREATE INDEX ON documents (hash);
CREATE TABLE chunks (
    id bigint PRIMARY KEY, document bigint NOT NULL REFERENCES documents ON DELETE CASCADE,
    start bigint NOT NULL, "end" bigint NOT NULL, text text NOT NULL, headings text NOT NULL,
    terms integer NOT NULL, words text[] NOT NULL);
CREATE INDEX ON chunks (document, start);
CREATE INDEX ON chunks USING gin (words) WITH (fastupdate = off);
CREATE TABLE vectors (
    chunk bigint PRIMARY KEY REFERENCES chunks ON DELETE CASCADE, vector vector NOT NULL);
CREATE TABLE terms (term text COLLATE "C" PRIMARY KEY, chunks bigint NOT NULL);
"""
_DOCUMENT = (
    "SELECT d.id, d.collection, d.doc_id, d.name, d.hash, d.length, d.pages, d.metadata, s.path"
    " FROM documents d JOIN sources s ON d.source = s.id"
)
_CHUNK = 'SELECT c.id, c.document, c.start, c."end", c.text, c.headings, c.terms FROM chunks c'


class PostgresStore(Database, Counted):
    """Raises `DataError` for a server that is not there or lacks pgvector, a base that is not there
    and not `new`, and for a later version; `ConfigError` for an address that cannot be right."""

    def __init__(self, address: str, *, new: bool = True) -> None:
        url, _, schema = address.partition("#")
        schema = schema or "khaosz"
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise ConfigError(
                f"{schema} is no name for a schema", hint="small letters, digits and _"
            )
        super().__init__(url, schema)
        self._frequency: Counter[str] = Counter()  # what one transaction changes
        self._counted: Counter[str] = Counter()  # the same
        with ExitStack() as opened:
            opened.callback(self._db.close)
            self._open(new)
            opened.pop_all()

    def _open(self, new: bool) -> None:
        self._path()
        if not self._there():
            if not new:
                raise DataError(
                    f"knowledge base {self.where} not found",
                    hint=f"khaosz rag add FILES --kb '{self.where}'",
                )
            self._create()
        if (found := self.get("version")) != VERSION:
            raise DataError(
                f"{self.where} has version {found} of the layout, this program {VERSION}"
            )
        self._adapt()

    def _there(self) -> bool:
        found = self._one("SELECT to_regclass(%s)", (f"{self._schema}.meta",))
        return found is not None and found[0] is not None

    def _create(self) -> None:
        with self.writing():
            if self._there():  # another process was first
                return
            with self._typed("pgvector has to be installed on the server, by its administrator"):
                self._db.execute("CREATE EXTENSION IF NOT EXISTS vector SCHEMA public")
            self._path()
            # An administrator may have made it for one who may make none.
            if self._one("SELECT FROM pg_namespace WHERE nspname = %s", (self._schema,)) is None:
                self._run(f"CREATE SCHEMA {self._schema}")
            self._run(_SCHEMA)
            self.set("version", VERSION)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction; another writer is waited for. Raises `DataError`, and nothing is
        changed, when the server refuses or is gone."""
        assert self._db.info.transaction_status != TransactionStatus.INTRANS, "writing inside"
        self._frequency, self._counted = Counter(), Counter()
        with self._typed(), self._db.transaction():
            self._run(f"SET LOCAL lock_timeout = '{_BUSY}'")
            self._run("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (self._schema,))
            yield
            self._settle()

    def _settle(self) -> None:
        """The sums of a transaction, at its end."""
        changed = {term: count for term, count in self._frequency.items() if count}
        if changed:
            # Once for a transaction: a row that is written again and again leaves its ghosts.
            names = sorted(changed)
            self._run(
                "INSERT INTO terms SELECT * FROM unnest(%s::text[], %s::bigint[])"
                " ON CONFLICT (term) DO UPDATE SET chunks = terms.chunks + excluded.chunks",
                (names, [changed[term] for term in names]),
            )
        for key, by in self._counted.items():
            self.set(key, str(int(self.get(key) or 0) + by))

    # ------------------------------------------------------------------------------------ settings

    def get(self, key: str) -> str | None:
        row = self._one("SELECT value FROM meta WHERE key = %s", (key,))
        return None if row is None else row[0]

    def set(self, key: str, value: str) -> None:
        self._run(
            "INSERT INTO meta VALUES (%s, %s)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def unset(self, key: str) -> None:
        self._run("DELETE FROM meta WHERE key = %s", (key,))

    def settings(self) -> dict[str, str]:
        return dict(self._run("SELECT key, value FROM meta").fetchall())

    @property
    def vector_count(self) -> int:
        return self._number("SELECT count(*) FROM vectors")

    # --------------------------------------------------------------------------------------- write

    def replace(
        self, collection: str, source: SourceFile, documents: Sequence[NewDocument]
    ) -> None:
        self.remove_source(collection, source.path)
        number = self._next("sources")
        self._run(
            "INSERT INTO sources VALUES (%s,%s,%s,%s,%s,%s,%s)",
            (
                *(number, key_of(collection, source.path), escaped(collection)),
                *(escaped(source.path), source.size, source.mtime_ns, source.sha256),
            ),
        )
        first, row = self._next("documents"), self._next("chunks")
        rows: list[tuple] = []
        chunks: list[tuple] = []
        vectors: list[tuple[int, np.ndarray]] = []
        for owner, document in enumerate(documents, first):
            rows.append(
                (
                    *(owner, number, escaped(collection), escaped(document.doc_id)),
                    *(escaped(document.name), document.hash, document.length),
                    *(json.dumps(document.pages), json.dumps(document.metadata)),
                )
            )
            for chunk in document.chunks:
                found = terms(chunk.indexed)
                distinct = set(found)
                self._frequency.update(distinct)
                self._counted["terms"] += len(found)
                chunks.append(
                    (
                        *(row, owner, chunk.start, chunk.end, escaped(chunk.text)),
                        *(json.dumps(chunk.headings), len(found), sorted(distinct)),
                    )
                )
                if chunk.vector is not None:
                    vectors.append((row, chunk.vector))
                row += 1
        self._copy("documents", _TYPES["documents"], rows)
        self._copy("chunks", _TYPES["chunks"], chunks)
        self._counted["chunks"] += len(chunks)
        self._add_vectors(vectors)
        self._counted["generation"] += 1

    def _next(self, table: str) -> int:
        return self._number(f"SELECT coalesce(max(id), 0) + 1 FROM {table}")

    def touch(self, collection: str, source: SourceFile) -> None:
        self._run(
            "UPDATE sources SET size = %s, mtime_ns = %s WHERE key = %s",
            (source.size, source.mtime_ns, key_of(collection, source.path)),
        )

    def remove_source(self, collection: str, path: str) -> bool:
        row = self._one("SELECT id FROM sources WHERE key = %s", (key_of(collection, path),))
        if row is None:
            return False
        owned = self._run(
            "SELECT c.terms, c.words FROM chunks c JOIN documents d ON c.document = d.id"
            " WHERE d.source = %s",
            row,
        )
        for length, words in owned:
            self._frequency.subtract(words)
            self._counted["terms"] -= length
            self._counted["chunks"] -= 1
        self._run("DELETE FROM sources WHERE id = %s", row)
        self._counted["generation"] += 1
        return True

    def rebuild_postings(self) -> None:
        self._run("DELETE FROM terms")
        self._frequency, last = Counter(), -1
        chunks = total = 0
        while rows := self._run(
            "SELECT id, text, headings FROM chunks WHERE id > %s ORDER BY id LIMIT %s",
            (last, _READ),
        ).fetchall():
            made = []
            for last, text, headings in rows:
                found = terms(NewChunk(0, 0, plain(text), tuple(json.loads(headings))).indexed)
                distinct = sorted(set(found))
                self._frequency.update(distinct)
                made.append((len(found), distinct, last))
                total += len(found)
            chunks += len(rows)
            with self._typed():
                self._db.cursor().executemany(
                    "UPDATE chunks SET terms = %s, words = %s WHERE id = %s", made
                )
        self.set("chunks", str(chunks))
        self.set("terms", str(total))
        self._counted = Counter(generation=1)

    def set_vectors(self, vectors: Iterable[tuple[int, np.ndarray]]) -> None:
        given = list(vectors)
        numbers = [int(number) for number, _ in given]
        self._run("DELETE FROM vectors WHERE chunk = ANY(%s)", (numbers,))
        self._add_vectors(given)
        self._counted["generation"] += 1

    def _add_vectors(self, vectors: Sequence[tuple[int, np.ndarray]]) -> None:
        if not vectors:
            return
        self._copy("vectors", ("int8", "vector"), ((int(n), vector) for n, vector in vectors))
        size = self.dimension
        if size <= LONGEST_INDEXED and not self._graph() and self.vector_count > EXACT_UP_TO:
            # Only vectors of this length: those of another embedder may not be swept out yet.
            self._run(
                "CREATE INDEX vectors_nearest ON vectors"
                f" USING hnsw ((vector::vector({size})) vector_ip_ops)"
                f" WHERE vector_dims(vector) = {size}"
            )

    def _graph(self) -> bool:
        found = self._one("SELECT to_regclass(%s)", (f"{self._schema}.vectors_nearest",))
        return found is not None and found[0] is not None

    def forget_vectors(self) -> None:
        self._run("DROP INDEX IF EXISTS vectors_nearest")
        self._run("DELETE FROM vectors")
        self._counted["generation"] += 1

    # ---------------------------------------------------------------------------------------- read

    def source(self, collection: str, path: str) -> SourceFile | None:
        row = self._one(
            "SELECT path, size, mtime_ns, sha256 FROM sources WHERE key = %s",
            (key_of(collection, path),),
        )
        return None if row is None else SourceFile(plain(row[0]), *row[1:])

    def source_paths(self, collection: str) -> list[str]:
        found = self._run("SELECT path FROM sources WHERE collection = %s", (escaped(collection),))
        return [plain(row[0]) for row in found]

    def sources(self) -> Iterator[tuple[str, SourceFile]]:
        for collection, path, *rest in self._run(
            "SELECT collection, path, size, mtime_ns, sha256 FROM sources ORDER BY id"
        ):
            yield plain(collection), SourceFile(plain(path), *rest)

    def contents(self, collection: str, path: str) -> list[NewDocument]:
        key = (key_of(collection, path),)
        documents = [
            _document(row) for row in self._run(_DOCUMENT + " WHERE s.key = %s ORDER BY d.id", key)
        ]
        chunks: dict[int, list[NewChunk]] = {document.id: [] for document in documents}
        rows = self._run(
            'SELECT c.document, c.start, c."end", c.text, c.headings, v.vector FROM chunks c'
            " JOIN documents d ON d.id = c.document JOIN sources s ON s.id = d.source"
            " LEFT JOIN vectors v ON v.chunk = c.id WHERE s.key = %s ORDER BY c.id",
            key,
            binary=True,
        )
        for document, start, end, text, headings, vector in rows:
            chunk = NewChunk(start, end, plain(text), tuple(json.loads(headings)), vector)
            chunks[document].append(chunk)
        return [document.with_chunks(chunks[document.id]) for document in documents]

    def counts(self) -> dict[str, int]:
        tables = ("sources", "documents", "chunks", "vectors", "terms WHERE chunks > 0")
        return {t.split()[0]: self._number(f"SELECT count(*) FROM {t}") for t in tables}

    def size(self) -> int:
        return self._number(
            "SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = %s::regnamespace",
            (self._schema,),
        )

    def documents(self, collection: str | None = None) -> list[StoredDocument]:
        where = "" if collection is None else " WHERE d.collection = %s"
        values = () if collection is None else (escaped(collection),)
        order = " ORDER BY d.collection, d.name, d.id"
        return [_document(row) for row in self._run(_DOCUMENT + where + order, values)]

    def owners(self, numbers: Sequence[int]) -> dict[int, StoredDocument]:
        wanted = sorted({int(number) for number in numbers})
        found = map(_document, self._run(_DOCUMENT + " WHERE d.id = ANY(%s)", (wanted,)))
        return {document.id: document for document in found}

    def document_by_hash(self, digest: str) -> StoredDocument | None:
        row = self._one(_DOCUMENT + " WHERE d.hash = %s LIMIT 1", (digest,))
        return None if row is None else _document(row)

    def text(self, document: int) -> str:
        return whole_text(self.chunks_of(document))

    def chunks(self, numbers: Sequence[int]) -> list[StoredChunk]:
        wanted = [int(number) for number in numbers]
        rows = {row[0]: row for row in self._run(_CHUNK + " WHERE c.id = ANY(%s)", (wanted,))}
        return [_chunk(rows[number]) for number in wanted if number in rows]

    def chunks_of(self, document: int) -> list[StoredChunk]:
        rows = self._run(_CHUNK + " WHERE c.document = %s ORDER BY c.start", (int(document),))
        return [_chunk(row) for row in rows]

    def chunk_numbers(
        self, *, collection: str | None = None, name: str | None = None
    ) -> np.ndarray:
        where, values = _only(collection, name)
        query = "SELECT c.id FROM chunks c JOIN documents d ON d.id = c.document"
        return _numbers(self._run(query + where + " ORDER BY c.id", values, binary=True))

    def unembedded(self) -> Iterator[StoredChunk]:
        where = " WHERE NOT EXISTS (SELECT FROM vectors v WHERE v.chunk = c.id) ORDER BY c.id"
        for row in self._run(_CHUNK + where):
            yield _chunk(row)

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        found = self._run("SELECT chunk, vector FROM vectors ORDER BY chunk", binary=True)
        rows = found.fetchall()
        matrix = np.array([vector for _, vector in rows], np.float32)
        numbers = np.array([number for number, _ in rows], np.int64)
        return numbers, matrix.reshape(len(rows), self.dimension)

    def document_frequencies(self, wanted: Sequence[str]) -> dict[str, int]:
        return dict(
            self._run(
                "SELECT term, chunks FROM terms WHERE term = ANY(%s) AND chunks > 0",
                (list(wanted),),
            ).fetchall()
        )

    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        with self.reading():
            # The planner does not know that looking into an array of hundreds takes its time.
            self._run("SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off")
            rows = self._run(
                "SELECT (SELECT array_agg(c.id ORDER BY c.id) FROM chunks c"
                " WHERE c.words @> ARRAY[x.term])"
                " FROM unnest(%s::text[]) WITH ORDINALITY x (term, place) ORDER BY place",
                (list(wanted),),
                binary=True,
            ).fetchall()
            self._run("SET LOCAL enable_seqscan = on; SET LOCAL enable_indexscan = on")
        return [np.array(found or [], np.int64) for (found,) in rows]

    def nearest(
        self,
        query: np.ndarray,
        limit: int,
        allowed: np.ndarray | None = None,
        *,
        collection: str | None = None,
        name: str | None = None,
    ) -> list[tuple[int, float]]:
        """Chunk numbers and cosines, best first. The server filters by collection and name; of
        `allowed` only the number is looked at."""
        where, values = _only(collection, name)
        tables = "vectors v JOIN chunks c ON c.id = v.chunk JOIN documents d ON d.id = c.document"
        exact = (allowed is not None and len(allowed) <= EXACT_UP_TO) or not self._graph()
        # Vectors have length 1: the inner product, of which <#> is the negative, is the cosine.
        distance = "v.vector <#> %b"
        if not exact:
            size = len(query)
            distance = f"v.vector::vector({size}) <#> %b"
            where += f"{' AND' if where else ' WHERE'} vector_dims(v.vector) = {size}"
        if collection is None and name is None:
            tables = "vectors v"
        with self.reading():
            if not exact:
                self._run(f"SET LOCAL hnsw.ef_search = {min(1000, max(200, 2 * limit))}")
                self._run("SET LOCAL hnsw.iterative_scan = strict_order")
                self._run(f"SET LOCAL hnsw.max_scan_tuples = {_SCAN}")
            rows = self._run(
                f"SELECT v.chunk, {distance} AS distance FROM {tables}{where}"
                f" ORDER BY distance{', v.chunk' if exact else ''} LIMIT %s",
                (query, *values, limit),
            ).fetchall()
        return sorted(
            ((number, -float(distance)) for number, distance in rows),
            key=lambda pair: (-pair[1], pair[0]),
        )


_TYPES = {
    "documents": ("int8", "int8", *("text",) * 4, "int8", "text", "text"),
    "chunks": ("int8", "int8", "int8", "int8", "text", "text", "int4", "text[]"),
}


def _only(collection: str | None, name: str | None) -> tuple[str, tuple[str, ...]]:
    clauses = {
        "d.collection = %s": None if collection is None else escaped(collection),
        "d.name ~ %s": None if name is None else f"^(?:{glob_pattern(escaped(name))})$",
    }
    used = {clause: value for clause, value in clauses.items() if value is not None}
    return f" WHERE {' AND '.join(used)}" if used else "", tuple(used.values())


def _numbers(cursor: psycopg.Cursor[Any]) -> np.ndarray:
    return np.array(cursor.fetchall(), np.int64).reshape(-1)


def _document(row: tuple) -> StoredDocument:
    number, collection, doc_id, name, digest, length, pages, metadata, path = row
    return StoredDocument(
        *(number, plain(collection), plain(doc_id), plain(name), digest, length),
        *(tuple(json.loads(pages)), json.loads(metadata), plain(path)),
    )


def _chunk(row: tuple) -> StoredChunk:
    number, document, start, end, text, headings, count = row
    return StoredChunk(
        number, document, start, end, plain(text), tuple(json.loads(headings)), count
    )
