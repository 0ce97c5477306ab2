"""A knowledge base in a schema of a PostgreSQL database, with pgvector.

The tables are those of `sql.py`; the terms of a chunk stand in an array with a GIN index, and
vectors in a column of pgvector's type. The server searches for the nearest: it compares all vectors
up to `EXACT_UP_TO`, and uses an HNSW graph for more.

One writer (an advisory lock of the schema) and any number of readers, on any number of machines.
The changes inside one `with store.writing()` are atomic.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from psycopg.pq import TransactionStatus

from khaosz.errors import ConfigError, DataError
from khaosz.rag.store.postgres_server import Database
from khaosz.rag.store.records import SourceFile, glob_pattern
from khaosz.rag.store.sql import VERSION, Store

EXACT_UP_TO = 10_000  # vectors
LONGEST_INDEXED = 2000  # dimensions that pgvector's HNSW takes
_BUSY = "30s"  # a writer waits for another one
_SCAN = 200_000  # vectors the graph visits until enough pass a filter
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


class PostgresStore(Database, Store):
    """Raises `DataError` for a server that cannot be reached or lacks pgvector, a missing knowledge
    base without `new`, and a later version; `ConfigError` for an invalid address."""

    _by_source = "s.key = ?"
    _by_name = "d.name ~ ?"

    def __init__(self, address: str, *, new: bool = True) -> None:
        url, _, schema = address.partition("#")
        schema = schema or "khaosz"
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise ConfigError(
                f"{schema} is not a valid schema name", hint="lowercase letters, digits and _"
            )
        super().__init__(url, schema)
        with ExitStack() as stack:
            stack.callback(self._db.close)
            self._set_path()
            if not self._exists("meta"):
                if not new:
                    raise DataError(
                        f"knowledge base {self.where} not found",
                        hint=f"khaosz rag add FILES --kb '{self.where}'",
                    )
                self._create()
            self._check_version()
            self._register_vectors()
            stack.pop_all()

    def _exists(self, relation: str) -> bool:
        return self._one("SELECT to_regclass(?)", (f"{self._schema}.{relation}",)) != (None,)

    def _create(self) -> None:
        with self.writing():
            if self._exists("meta"):  # another process created it first
                return
            with self._typed("an administrator has to install pgvector on the server"):
                self._db.execute("CREATE EXTENSION IF NOT EXISTS vector SCHEMA public")
            self._set_path()
            # An administrator may have created it for a role that may not create schemas.
            if self._one("SELECT 1 FROM pg_namespace WHERE nspname = ?", (self._schema,)) is None:
                self._run(f"CREATE SCHEMA {self._schema}")
            self._run(_SCHEMA)
            self.set("version", VERSION)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        assert self._db.info.transaction_status != TransactionStatus.INTRANS, "writing inside"
        with self._typed(), self._db.transaction():
            self._run(f"SET LOCAL lock_timeout = '{_BUSY}'")
            self._run("SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", (self._schema,))
            yield

    def size(self) -> int:
        return self._number(
            "SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = ?::regnamespace",
            (self._schema,),
        )

    # --------------------------------------------------------------------------------------- write

    def _encode(self, text: str) -> str:
        """NUL, which PostgreSQL's text cannot hold, as two characters, the first of them ESC."""
        return text.replace("\x1b", "\x1be").replace("\0", "\x1b0")

    def _decode(self, text: str) -> str:
        return text.replace("\x1b0", "\0").replace("\x1be", "\x1b")

    def _source_key(self, collection: str, path: str) -> tuple[str, ...]:
        # Of one length, since an index takes no path of several thousand characters.
        return (str(uuid.uuid5(uuid.NAMESPACE_URL, f"{collection}\0{path}")),)

    def _name_pattern(self, glob: str) -> str:
        return f"^(?:{glob_pattern(self._encode(glob))})$"

    def _insert_source(self, number: int, collection: str, source: SourceFile) -> None:
        names = map(self._encode, (collection, source.path))
        key = self._source_key(collection, source.path)
        self._run(
            "INSERT INTO sources VALUES (?,?,?,?,?,?,?)",
            (number, *key, *names, source.size, source.mtime_ns, source.sha256),
        )

    def _insert_documents(self, rows: Sequence[tuple]) -> None:
        self._copy("documents", ("int8", "int8", *("text",) * 4, "int8", "text", "text"), rows)

    def _insert_chunks(self, rows: Sequence[tuple]) -> None:
        self._copy("chunks", (*("int8",) * 4, "text", "text", "int4", "text[]"), rows)

    def _put_vectors(self, vectors: Sequence[tuple[int, np.ndarray]]) -> None:
        if not vectors:
            return
        numbers = [number for number, _ in vectors]
        self._run("DELETE FROM vectors WHERE chunk = ANY(?)", (numbers,))
        self._copy("vectors", ("int8", "vector"), vectors)
        size = self.dimension
        if size <= LONGEST_INDEXED and not self._graph() and self.vector_count > EXACT_UP_TO:
            # Only vectors of this length: those of another embedder may not be removed yet.
            self._run(
                "CREATE INDEX vectors_nearest ON vectors"
                f" USING hnsw ((vector::vector({size})) vector_ip_ops)"
                f" WHERE vector_dims(vector) = {size}"
            )

    def _graph(self) -> bool:
        return self._exists("vectors_nearest")

    def forget_vectors(self) -> None:
        self._run("DROP INDEX IF EXISTS vectors_nearest")
        super().forget_vectors()

    def _remove_postings(self, source: int) -> Sequence[tuple[int, list[str]]]:
        rows: list[tuple[int, list[str]]] = self._run(
            "SELECT c.terms, c.words FROM chunks c JOIN documents d ON c.document = d.id"
            " WHERE d.source = ?",
            (source,),
        ).fetchall()
        return rows

    def _replace_postings(self, rows: Sequence[tuple[int, int, list[str]]]) -> None:
        with self._typed():
            self._db.cursor().executemany(
                "UPDATE chunks SET terms = %s, words = %s WHERE id = %s",
                [(occurrences, distinct, number) for number, occurrences, distinct in rows],
            )

    def _add_to_terms(self, changes: Mapping[str, int]) -> None:
        names = sorted(changes)
        self._run(
            "INSERT INTO terms SELECT * FROM unnest(?::text[], ?::bigint[])"
            " ON CONFLICT (term) DO UPDATE SET chunks = terms.chunks + excluded.chunks",
            (names, [changes[name] for name in names]),
        )

    # ---------------------------------------------------------------------------------------- read

    def _matching(self, query: str, column: str, values: Sequence[Any]) -> Any:
        return self._run(f"{query} WHERE {column} = ANY(?)", (list(values),))

    def _matrix(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(vectors, np.float32)

    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        with self.reading():
            # The planner does not know that looking into an array of hundreds takes its time.
            self._run("SET LOCAL enable_seqscan = off; SET LOCAL enable_indexscan = off")
            rows = self._run(
                "SELECT (SELECT array_agg(c.id ORDER BY c.id) FROM chunks c"
                " WHERE c.words @> ARRAY[x.term])"
                " FROM unnest(?::text[]) WITH ORDINALITY x (term, place) ORDER BY place",
                (list(wanted),),
                binary=True,
            ).fetchall()
            self._run("SET LOCAL enable_seqscan = on; SET LOCAL enable_indexscan = on")
        return [np.array(numbers or [], np.int64) for (numbers,) in rows]

    def nearest(
        self,
        query: np.ndarray,
        limit: int,
        allowed: np.ndarray | None = None,
        *,
        collection: str | None = None,
        name: str | None = None,
    ) -> list[tuple[int, float]]:
        """Chunk numbers and cosines, best first. The server filters by collection and name; only
        the length of `allowed` is used."""
        where, values = self._filter(collection, name)
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
                f" ORDER BY distance{', v.chunk' if exact else ''} LIMIT ?",
                (query, *values, limit),
            ).fetchall()
        return sorted(
            ((number, -float(distance)) for number, distance in rows),
            key=lambda pair: (-pair[1], pair[0]),
        )
