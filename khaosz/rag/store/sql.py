"""The store of a knowledge base: statements, rows and counts that SQLite and PostgreSQL share.

    meta        settings, and the counts of chunks and terms
    sources     a file that was added: path, size, time, hash     (to skip unchanged files)
    documents   name, hash of the text, pages, metadata           (one or more per source)
    chunks      start, end, text, heading path, number of terms   (they cover their document)
    vectors     float32 per chunk
    terms       in how many chunks a term occurs

Each store adds an index from terms to chunks, and a type for vectors.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, chain, count
from typing import Any, ClassVar

import numpy as np

from khaosz.database import version_error
from khaosz.files import natural_key
from khaosz.rag.store.records import (
    NewChunk,
    NewDocument,
    SourceFile,
    StoredChunk,
    StoredDocument,
    indexed_text,
)
from khaosz.rag.terms import terms

VERSION = "1"  # of the tables
_BLOCK = 5000  # chunks read at once
_DOCUMENT = (
    "SELECT d.id, d.collection, d.doc_id, d.name, d.hash, d.length, d.pages, d.metadata, s.path"
    " FROM documents d JOIN sources s ON d.source = s.id"
)
_CHUNK = 'SELECT c.id, c.document, c.start, c."end", c.text, c.headings, c.terms FROM chunks c'


class Store(ABC):
    """Built on the hooks below, in which values stand as `?` in statements. Raises `DataError` when
    the store cannot be used, reached, read or written."""

    where: str  # the address, without its password
    _by_source: ClassVar[str]  # the condition on `sources s` that takes `_source_key`
    _by_name: ClassVar[str]  # the condition on `documents d` that takes `_name_pattern`

    _frequency: Counter[str]  # chunks per term that the open transaction adds or removes
    _counts: Counter[str]  # the same for settings that are counts

    # --------------------------------------------------------------------------------------- hooks

    @abstractmethod
    def _run(self, query: str, values: Sequence[Any] = (), *, binary: bool = False) -> Any:
        """A cursor. binary: the format in which PostgreSQL sends vectors and many numbers."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[None]:
        """For one writer; raises `DataError` when the database refuses."""

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def reading(self) -> AbstractContextManager[None]:
        """All reads inside see one state, whatever is written meanwhile."""

    @abstractmethod
    def size(self) -> int:
        """Bytes on disk."""

    @abstractmethod
    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        """For each term the ascending int64 numbers of the chunks that contain it."""

    @abstractmethod
    def _matching(self, query: str, column: str, values: Sequence[Any]) -> Iterable[tuple]:
        """Rows of `query`, which has no condition yet, whose `column` is one of `values`."""

    @abstractmethod
    def _source_key(self, collection: str, path: str) -> tuple[str, ...]: ...

    @abstractmethod
    def _name_pattern(self, glob: str) -> str: ...

    @abstractmethod
    def _insert_source(self, number: int, collection: str, source: SourceFile) -> None: ...

    @abstractmethod
    def _insert_documents(self, rows: Sequence[tuple]) -> None:
        """Rows have the columns of the table."""

    @abstractmethod
    def _insert_chunks(self, rows: Sequence[tuple]) -> None:
        """Rows have the columns of the table, then the list of distinct terms to index."""

    @abstractmethod
    def _put_vectors(self, vectors: Sequence[tuple[int, np.ndarray]]) -> None:
        """Insert or replace."""

    @abstractmethod
    def _remove_postings(self, source: int) -> Iterable[tuple[int, Iterable[str]]]:
        """The number of terms and the distinct terms of each chunk of a source, which leave the
        index with it."""

    @abstractmethod
    def _replace_postings(self, rows: Sequence[tuple[int, int, list[str]]]) -> None:
        """Chunk number, number of terms and distinct terms of each chunk."""

    @abstractmethod
    def _add_to_terms(self, changes: Mapping[str, int]) -> None:
        """Add to the number of chunks per term."""

    @abstractmethod
    def _matrix(self, vectors: Sequence[Any]) -> np.ndarray:
        """float32 (N, D) of N >= 1 values of the column `vector`."""

    def _encode(self, text: str) -> str:
        """Text as the database stores it."""
        return text

    def _decode(self, text: str) -> str:
        return text

    # ---------------------------------------------------------------------------------- statements

    def _one(self, query: str, values: Sequence[Any] = ()) -> tuple | None:
        row: tuple | None = self._run(query, values).fetchone()
        return row

    def _number(self, query: str, values: Sequence[Any] = ()) -> int:
        row = self._one(query, values)
        assert row is not None, query
        return int(row[0])

    def _check_version(self) -> None:
        if (version := self.get("version")) != VERSION:
            raise version_error(self.where, version, VERSION)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction; a second writer waits. Raises `DataError`, and changes nothing, when
        the database refuses."""
        with self._transaction():
            self._frequency, self._counts = Counter(), Counter()
            yield
            # Once per transaction: rows that are written often slow both databases down.
            if changes := {term: change for term, change in self._frequency.items() if change}:
                self._add_to_terms(changes)
            for key, change in self._counts.items():
                self.set(key, str(int(self.get(key) or 0) + change))

    # ------------------------------------------------------------------------------------ settings

    def get(self, key: str) -> str | None:
        row = self._one("SELECT value FROM meta WHERE key = ?", (key,))
        return None if row is None else row[0]

    def set(self, key: str, value: str) -> None:
        """Inside `writing`."""
        self._run(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def unset(self, key: str) -> None:
        """Inside `writing`."""
        self._run("DELETE FROM meta WHERE key = ?", (key,))

    def settings(self) -> dict[str, str]:
        """All of them, including those of `COUNTED`."""
        return dict(self._run("SELECT key, value FROM meta").fetchall())

    @property
    def chunk_count(self) -> int:
        return int(self.get("chunks") or 0)

    @property
    def term_count(self) -> int:
        """Occurrences of terms, over all chunks."""
        return int(self.get("terms") or 0)

    @property
    def vector_count(self) -> int:
        return self._number("SELECT count(*) FROM vectors")

    @property
    def dimension(self) -> int:
        """Of vectors; 0 without an embedder."""
        return int(self.get("dimension") or 0)

    @property
    def revision(self) -> int:
        """Grows with every change; an index records the revision it was built from."""
        return int(self.get("generation") or 0)  # the setting's name in existing databases

    # ------------------------------------------------------------------ write, all inside `writing`

    def replace(
        self, collection: str, source: SourceFile, documents: Sequence[NewDocument]
    ) -> None:
        """Store a file's documents in place of its former ones."""
        self.remove_source(collection, source.path)
        source_id, chunk_ids = self._next_id("sources"), count(self._next_id("chunks"))
        self._insert_source(source_id, collection, source)
        document_rows: list[tuple] = []
        chunk_rows: list[tuple] = []
        vectors: list[tuple[int, np.ndarray]] = []
        for document_id, document in enumerate(documents, self._next_id("documents")):
            names = map(self._encode, (collection, document.doc_id, document.name))
            lists = map(_dumped, (document.pages, document.metadata))
            document_rows.append(
                (document_id, source_id, *names, document.hash, document.length, *lists)
            )
            for chunk in document.chunks:
                chunk_id = next(chunk_ids)
                place = chunk_id, document_id, chunk.start, chunk.end
                content = self._encode(chunk.text), _dumped(chunk.headings)
                counted = self._count_terms(chunk.headings, chunk.text)
                chunk_rows.append((*place, *content, *counted))
                if chunk.vector is not None:
                    vectors.append((chunk_id, chunk.vector))
        self._insert_documents(document_rows)
        self._insert_chunks(chunk_rows)
        self._put_vectors(vectors)
        self._counts["generation"] += 1

    def _count_terms(self, headings: Sequence[str], text: str) -> tuple[int, list[str]]:
        """The number of terms of a chunk that is added, and the distinct ones."""
        occurrences = terms(indexed_text(headings, text))
        distinct = sorted(set(occurrences))
        self._frequency.update(distinct)
        self._counts.update(chunks=1, terms=len(occurrences))
        return len(occurrences), distinct

    def _next_id(self, table: str) -> int:
        return self._number(f"SELECT coalesce(max(id), 0) + 1 FROM {table}")

    def set_metadata(self, document: int, metadata: dict[str, str]) -> None:
        self._run("UPDATE documents SET metadata = ? WHERE id = ?", (_dumped(metadata), document))

    def touch(self, collection: str, source: SourceFile) -> None:
        """Record another time of an unchanged file."""
        self._run(
            "UPDATE sources SET size = ?, mtime_ns = ?"
            f" WHERE id = (SELECT s.id FROM sources s WHERE {self._by_source})",
            (source.size, source.mtime_ns, *self._source_key(collection, source.path)),
        )

    def remove_source(self, collection: str, path: str) -> bool:
        """Returns whether it existed."""
        row = self._one(
            f"SELECT s.id FROM sources s WHERE {self._by_source}",
            self._source_key(collection, path),
        )
        if row is None:
            return False
        for occurrences, distinct in self._remove_postings(row[0]):
            self._frequency.subtract(distinct)
            self._counts.subtract({"chunks": 1, "terms": occurrences})
        self._run("DELETE FROM sources WHERE id = ?", row)
        self._counts["generation"] += 1
        return True

    def rebuild_postings(self) -> None:
        """Rebuild the lexical index from the chunks."""
        self._run("DELETE FROM terms")
        self.set("chunks", "0")
        self.set("terms", "0")
        self._frequency, self._counts = Counter(), Counter(generation=1)
        last = -1
        while rows := self._run(
            "SELECT id, text, headings FROM chunks WHERE id > ? ORDER BY id LIMIT ?",
            (last, _BLOCK),
        ).fetchall():
            self._replace_postings(
                [
                    (number, *self._count_terms(json.loads(headings), self._decode(text)))
                    for number, text, headings in rows
                ]
            )
            last = rows[-1][0]

    def set_vectors(self, vectors: Iterable[tuple[int, np.ndarray]]) -> None:
        """float32 (D,) per chunk number."""
        rows = [(int(number), vector) for number, vector in vectors]
        # A file may be removed while its chunks are embedded.
        existing = {chunk.id for chunk in self.chunks([number for number, _ in rows])}
        self._put_vectors([row for row in rows if row[0] in existing])
        self._counts["generation"] += 1

    def forget_vectors(self) -> None:
        self._run("DELETE FROM vectors")
        self._counts["generation"] += 1

    # ---------------------------------------------------------------------------------------- read

    def source(self, collection: str, path: str) -> SourceFile | None:
        row = self._one(
            f"SELECT s.path, s.size, s.mtime_ns, s.sha256 FROM sources s WHERE {self._by_source}",
            self._source_key(collection, path),
        )
        return None if row is None else SourceFile(self._decode(row[0]), *row[1:])

    def sources(self) -> Iterator[tuple[str, SourceFile]]:
        """Collections and files, in the order of writing."""
        for collection, path, *rest in self._run(
            "SELECT collection, path, size, mtime_ns, sha256 FROM sources ORDER BY id"
        ):
            yield self._decode(collection), SourceFile(self._decode(path), *rest)

    def contents(self, collection: str, path: str) -> list[NewDocument]:
        """The documents of a source with chunks and vectors, as `replace` takes them."""
        key = self._source_key(collection, path)
        documents = self.documents_of(collection, path)
        chunks: dict[int, list[NewChunk]] = {document.id: [] for document in documents}
        rows = self._run(
            'SELECT c.document, c.start, c."end", c.text, c.headings, v.vector FROM chunks c'
            " JOIN documents d ON d.id = c.document JOIN sources s ON s.id = d.source"
            f" LEFT JOIN vectors v ON v.chunk = c.id WHERE {self._by_source} ORDER BY c.id",
            key,
            binary=True,
        )
        for document, start, end, text, headings, raw in rows:
            vector = None if raw is None else self._matrix([raw])[0]
            chunks[document].append(
                NewChunk(start, end, self._decode(text), tuple(json.loads(headings)), vector)
            )
        return [document.with_chunks(chunks[document.id]) for document in documents]

    def counts(self) -> dict[str, int]:
        """The numbers of sources, documents, chunks, vectors and distinct terms."""
        # A term that occurs nowhere any more may keep its row.
        tables = ("sources", "documents", "chunks", "vectors", "terms WHERE chunks > 0")
        return {table.split()[0]: self._number(f"SELECT count(*) FROM {table}") for table in tables}

    def documents(self, collection: str | None = None) -> list[StoredDocument]:
        """Ordered by collection, name and number, document 2 before document 10."""
        where, values = self._filter(collection, None)
        documents = self._documents(f"{where} ORDER BY d.id", values)
        return sorted(documents, key=lambda each: (each.collection, natural_key(each.name)))

    def owners(self, numbers: Sequence[int]) -> dict[int, StoredDocument]:
        """Documents by number; removed ones are left out."""
        distinct = sorted({int(number) for number in numbers})
        return {row[0]: self._document(row) for row in self._matching(_DOCUMENT, "d.id", distinct)}

    def documents_of(self, collection: str, path: str) -> list[StoredDocument]:
        """The documents of a source."""
        key = self._source_key(collection, path)
        return self._documents(f" WHERE {self._by_source} ORDER BY d.id", key)

    def document_by_hash(self, digest: str) -> StoredDocument | None:
        return next(iter(self._documents(" WHERE d.hash = ? LIMIT 1", (digest,))), None)

    def text(self, document: int) -> str:
        parts, end = [], 0
        for chunk in self.chunks_of(document):  # they cover it, and may overlap
            parts.append(chunk.text[end - chunk.start :] if chunk.start < end else chunk.text)
            end = max(end, chunk.end)
        return "".join(parts)

    def first_lines(self, document: int, last: int) -> dict[int, int]:
        """The line, from 1, in which each chunk starts, by the chunk's start: up to `last`."""
        # What a chunk has before the next one starts, since chunks may overlap.
        heads = (
            "SELECT start, substr(text, 1, CAST(coalesce(lead(start) OVER (ORDER BY start) - start,"
            " length(text)) AS integer)) AS head FROM chunks WHERE document = ? AND start <= ?"
        )
        rows = self._run(
            "SELECT start, length(head) - length(replace(replace(head, ?, ''), ?, ''))"
            f" FROM ({heads}) AS heads ORDER BY start",
            ("\n", "\r", document, last),
        ).fetchall()
        lines = accumulate((breaks for _, breaks in rows), initial=1)
        return {start: line for (start, _), line in zip(rows, lines, strict=False)}

    def chunks(self, numbers: Sequence[int]) -> list[StoredChunk]:
        """In the order of `numbers`; removed ones are left out."""
        ids = [int(number) for number in numbers]
        rows = {row[0]: row for row in self._matching(_CHUNK, "c.id", ids)}
        return [self._chunk(rows[number]) for number in ids if number in rows]

    def chunks_of(self, document: int) -> list[StoredChunk]:
        """Ordered by start."""
        rows = self._run(_CHUNK + " WHERE c.document = ? ORDER BY c.start", (int(document),))
        return [self._chunk(row) for row in rows]

    def chunk_numbers(
        self, *, collection: str | None = None, name: str | None = None
    ) -> np.ndarray:
        """Ascending int64 numbers of the chunks of a collection, of documents whose name matches a
        GLOB."""
        where, values = self._filter(collection, name)
        query = f"SELECT c.id FROM chunks c JOIN documents d ON d.id = c.document{where}"
        cursor = self._run(query, values, binary=True)
        numbers = [np.empty(0, np.int64)]
        while rows := cursor.fetchmany(_BLOCK):
            numbers.append(np.fromiter(chain.from_iterable(rows), np.int64, len(rows)))
        return np.sort(np.concatenate(numbers))

    def unembedded(self) -> Iterator[StoredChunk]:
        for row in self._run(
            _CHUNK + " WHERE NOT EXISTS (SELECT 1 FROM vectors v WHERE v.chunk = c.id)"
            " ORDER BY c.id"
        ):
            yield self._chunk(row)

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 chunk numbers (N,), ascending, and float32 vectors (N, D)."""
        shape = self.vector_count, self.dimension
        numbers, matrix = np.empty(shape[0], np.int64), np.empty(shape, np.float32)
        at = 0
        for some, rows in self.vector_blocks():
            numbers[at : at + len(some)], matrix[at : at + len(some)] = some, rows
            at += len(some)
        return numbers, matrix

    def vector_blocks(self, size: int = 10_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`vectors` in blocks of at most `size`."""
        cursor = self._run("SELECT chunk, vector FROM vectors ORDER BY chunk", binary=True)
        while rows := cursor.fetchmany(size):
            numbers = np.array([number for number, _ in rows], np.int64)
            yield numbers, self._matrix([vector for _, vector in rows])

    def document_frequencies(self, wanted: Sequence[str]) -> dict[str, int]:
        """The number of chunks that contain each term; absent terms are left out."""
        rows = self._matching("SELECT term, chunks FROM terms", "term", list(wanted))
        return {term: chunks for term, chunks in rows if chunks > 0}

    def _filter(self, collection: str | None, name: str | None) -> tuple[str, tuple[str, ...]]:
        """A WHERE clause on `documents d`, or nothing, and its values."""
        conditions = {}
        if collection is not None:
            conditions["d.collection = ?"] = self._encode(collection)
        if name is not None:
            conditions[self._by_name] = self._name_pattern(name)
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return where, tuple(conditions.values())

    def _documents(self, where: str, values: Sequence[Any]) -> list[StoredDocument]:
        return [self._document(row) for row in self._run(_DOCUMENT + where, values)]

    def _document(self, row: tuple) -> StoredDocument:
        number, collection, doc_id, name, digest, length, pages, metadata, path = row
        collection, doc_id, name, path = map(self._decode, (collection, doc_id, name, path))
        return StoredDocument(
            *(number, collection, doc_id, name, digest, length),
            *(tuple(json.loads(pages)), json.loads(metadata), path),
        )

    def _chunk(self, row: tuple) -> StoredChunk:
        number, document, start, end, text, headings, occurrences = row
        # Most chunks of most bases have no headings, and a search reads hundreds of chunks.
        path = () if headings == "[]" else tuple(json.loads(headings))
        return StoredChunk(number, document, start, end, self._decode(text), path, occurrences)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
