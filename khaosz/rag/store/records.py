"""The interface of a store of a knowledge base, and the records that it reads and writes.

Each store numbers its chunks and documents itself, ascending in the order of writing. What a
citation names (hash, start, end) is the same in every store.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

COUNTED = frozenset({"version", "chunks", "terms", "generation"})  # settings a store writes itself


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was added. Size in bytes, time in nanoseconds."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to store, with its vector if there is an embedder."""

    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    vector: np.ndarray | None = None

    @property
    def indexed(self) -> str:
        """What lexical search indexes: the headings above a chunk describe it too."""
        return "\n".join((*self.headings, self.text))


@dataclass(frozen=True, slots=True)
class NewDocument:
    doc_id: str
    name: str
    hash: str
    length: int
    chunks: Sequence[NewChunk]
    pages: tuple[int, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """pages: offsets at which pages 2, 3, ... start. length: characters. hash: SHA-256 of the
    text, which citations name."""

    id: int
    collection: str
    doc_id: str
    name: str
    hash: str
    length: int
    pages: tuple[int, ...]
    metadata: dict[str, str]
    path: str

    def with_chunks(self, chunks: Sequence[NewChunk]) -> NewDocument:
        return NewDocument(
            *(self.doc_id, self.name, self.hash, self.length, chunks, self.pages, self.metadata)
        )


@dataclass(frozen=True, slots=True)
class StoredChunk:
    id: int
    document: int
    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    terms: int


class Store(Protocol):
    """Raises `DataError` when the store cannot be used, reached, read or written."""

    where: str  # the address, without its password

    def close(self) -> None: ...

    def writing(self) -> AbstractContextManager[None]:
        """One atomic change. There is one writer at a time; a second one waits."""

    def reading(self) -> AbstractContextManager[None]:
        """All reads inside see one state, whatever is written meanwhile."""

    # settings

    def get(self, key: str) -> str | None: ...

    def set(self, key: str, value: str) -> None:
        """Inside `writing`."""

    def unset(self, key: str) -> None:
        """Inside `writing`."""

    def settings(self) -> dict[str, str]:
        """All of them, including those of `COUNTED`."""

    @property
    def chunk_count(self) -> int: ...

    @property
    def term_count(self) -> int:
        """Occurrences of terms, over all chunks."""

    @property
    def vector_count(self) -> int: ...

    @property
    def dimension(self) -> int:
        """Of vectors; 0 without an embedder."""

    @property
    def revision(self) -> int:
        """Grows with every change; an index records the revision it was built from."""

    # writes, all of them inside `writing`

    def replace(
        self, collection: str, source: SourceFile, documents: Sequence[NewDocument]
    ) -> None:
        """Store a file's documents in place of its former ones."""

    def touch(self, collection: str, source: SourceFile) -> None:
        """Record another time of an unchanged file."""

    def remove_source(self, collection: str, path: str) -> bool:
        """Returns whether it existed."""

    def rebuild_postings(self) -> None:
        """Rebuild the lexical index from the chunks."""

    def set_vectors(self, vectors: Iterable[tuple[int, np.ndarray]]) -> None:
        """float32 (D,) per chunk number."""

    def forget_vectors(self) -> None: ...

    # reads

    def source(self, collection: str, path: str) -> SourceFile | None: ...

    def source_paths(self, collection: str) -> list[str]: ...

    def sources(self) -> Iterator[tuple[str, SourceFile]]:
        """Collections and files, in the order of writing."""

    def contents(self, collection: str, path: str) -> list[NewDocument]:
        """The documents of a source with chunks and vectors, as `replace` takes them."""

    def counts(self) -> dict[str, int]:
        """The numbers of sources, documents, chunks, vectors and distinct terms."""

    def size(self) -> int:
        """Bytes on disk."""

    def documents(self, collection: str | None = None) -> list[StoredDocument]:
        """Ordered by collection, name and number."""

    def owners(self, numbers: Sequence[int]) -> dict[int, StoredDocument]:
        """Documents by number; removed ones are left out."""

    def document_by_hash(self, digest: str) -> StoredDocument | None: ...

    def text(self, document: int) -> str: ...

    def chunks(self, numbers: Sequence[int]) -> list[StoredChunk]:
        """In the order of `numbers`; removed ones are left out."""

    def chunks_of(self, document: int) -> list[StoredChunk]:
        """Ordered by start."""

    def chunk_numbers(
        self, *, collection: str | None = None, name: str | None = None
    ) -> np.ndarray:
        """Ascending int64 numbers of the chunks of a collection, of documents whose name matches a
        GLOB."""

    def unembedded(self) -> Iterator[StoredChunk]: ...

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 chunk numbers (N,), ascending, and float32 vectors (N, D)."""

    def document_frequencies(self, wanted: Sequence[str]) -> dict[str, int]:
        """The number of chunks that contain each term; absent terms are left out."""

    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        """For each term the ascending int64 numbers of the chunks that contain it."""


_GLOB = re.compile(r"(\*)|(\?)|\[(\^?)(\]?+[^\]]*)\]|(\[)|([^*?\[]+)", re.DOTALL)
_MEMBER = re.compile(r"([^\]])-(.)|(.)", re.DOTALL)


def glob_pattern(glob: str) -> str:
    """SQLite's GLOB as a regular expression for Python and PostgreSQL, to match whole strings: `*`
    any characters, `?` one, `[a-z]` and `[^a-z]` sets. An unclosed `[` matches nothing."""
    return _GLOB.sub(_expression, glob)


def _expression(part: re.Match[str]) -> str:
    any_, one, inverted, members, opened, plain = part.groups()
    if any_ or one:
        return ".*" if any_ else "."
    if opened:
        return "(?!.|$)"
    if plain:
        return re.escape(plain)
    return f"[{inverted}{_MEMBER.sub(_member, members)}]"


def _member(part: re.Match[str]) -> str:
    first, last, single = part.groups()
    if single:
        return re.escape(single)
    # SQLite reads z-a as a range without characters, beside the z itself.
    return re.escape(first) + (f"-{re.escape(last)}" if first <= last else "")
