"""What a store of a knowledge base is: the records that go in and come out, and its interface.

Chunk and document numbers are the store's own, ascending in the order of writing; another store has
other ones. What a citation names (hash, start, end) is the same in every store.
"""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

COUNTED = frozenset({"version", "chunks", "terms", "generation"})  # settings a store keeps itself


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was added. Size in bytes, time in nanoseconds."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class NewChunk:
    """A chunk to store, with its vector where there is an embedder."""

    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    vector: np.ndarray | None = None

    @property
    def indexed(self) -> str:
        """What lexical search reads: the headings above a chunk are about it too."""
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
    """pages: offsets at which pages 2, 3, ... begin. length: characters. hash: SHA-256 of the
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
    """Raises `DataError` for what cannot be used, reached, read or written."""

    where: str  # as a user names it, without a password

    def close(self) -> None: ...

    def writing(self) -> AbstractContextManager[None]:
        """What is in it is there whole or not at all. One writer; another is waited for."""

    def reading(self) -> AbstractContextManager[None]:
        """All reads inside see one state of the base, whatever is written meanwhile."""

    # settings

    def get(self, key: str) -> str | None: ...

    def set(self, key: str, value: str) -> None:
        """Inside `writing`."""

    def unset(self, key: str) -> None:
        """Inside `writing`."""

    def settings(self) -> dict[str, str]:
        """All of them, those the store counts itself (`COUNTED`) included."""

    @property
    def chunk_count(self) -> int: ...

    @property
    def term_count(self) -> int:
        """Occurrences of terms in all chunks."""

    @property
    def vector_count(self) -> int: ...

    @property
    def dimension(self) -> int:
        """Of vectors; 0 where there are none."""

    @property
    def generation(self) -> int:
        """Grows with every change: what an index was made from."""

    # writes, all of them inside `writing`

    def replace(
        self, collection: str, source: SourceFile, documents: Sequence[NewDocument]
    ) -> None:
        """Put a file's documents where its former ones were."""

    def touch(self, collection: str, source: SourceFile) -> None:
        """The same bytes with another time."""

    def remove_source(self, collection: str, path: str) -> bool:
        """Whether it was there."""

    def rebuild_postings(self) -> None:
        """Lexical search made again from the chunks."""

    def set_vectors(self, vectors: Iterable[tuple[int, np.ndarray]]) -> None:
        """float32 (D,) of chunks, by their numbers."""

    def forget_vectors(self) -> None: ...

    # reads

    def source(self, collection: str, path: str) -> SourceFile | None: ...

    def source_paths(self, collection: str) -> list[str]: ...

    def sources(self) -> Iterator[tuple[str, SourceFile]]:
        """Collections and files, in the order of writing."""

    def contents(self, collection: str, path: str) -> list[NewDocument]:
        """The documents of a source with chunks and vectors, as `replace` takes them."""

    def counts(self) -> dict[str, int]:
        """Of sources, documents, chunks, vectors and distinct terms."""

    def size(self) -> int:
        """Bytes on disk; 0 where that is not known."""

    def documents(self, collection: str | None = None) -> list[StoredDocument]:
        """By collection, name and number."""

    def owners(self, numbers: Sequence[int]) -> dict[int, StoredDocument]:
        """Documents by their numbers; those that are gone are left out."""

    def document_by_hash(self, digest: str) -> StoredDocument | None: ...

    def text(self, document: int) -> str: ...

    def chunks(self, numbers: Sequence[int]) -> list[StoredChunk]:
        """In the order asked for; those that are gone are left out."""

    def chunks_of(self, document: int) -> list[StoredChunk]:
        """By start."""

    def chunk_numbers(
        self, *, collection: str | None = None, name: str | None = None
    ) -> np.ndarray:
        """int64 numbers of the chunks of a collection, of documents whose name fits a GLOB."""

    def unembedded(self) -> Iterator[StoredChunk]: ...

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 chunk numbers (N,), ascending, and float32 vectors (N, D)."""

    def document_frequencies(self, wanted: Sequence[str]) -> dict[str, int]:
        """In how many chunks a term stands; terms that stand nowhere are left out."""

    def postings(self, wanted: Sequence[str]) -> list[np.ndarray]:
        """For each term the int64 numbers of the chunks that it stands in, ascending."""


class Counted(ABC):
    """What every store keeps among its settings; see `Store`."""

    @abstractmethod
    def get(self, key: str) -> str | None: ...

    @property
    def chunk_count(self) -> int:
        return int(self.get("chunks") or 0)

    @property
    def term_count(self) -> int:
        return int(self.get("terms") or 0)

    @property
    def generation(self) -> int:
        return int(self.get("generation") or 0)

    @property
    def dimension(self) -> int:
        return int(self.get("dimension") or 0)


def key_of(collection: str, path: str) -> str:
    """A source's, of one length however long its path is."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{collection}\0{path}"))


def whole_text(chunks: Iterable[StoredChunk]) -> str:
    """Of a document, from its chunks by start: they cover it, and may overlap."""
    parts, end = [], 0
    for chunk in chunks:
        parts.append(chunk.text[end - chunk.start :] if chunk.start < end else chunk.text)
        end = max(end, chunk.end)
    return "".join(parts)


_GLOB = re.compile(r"(\*)|(\?)|\[(\^?)(\]?+[^\]]*)\]|(\[)|([^*?\[]+)", re.DOTALL)
_MEMBER = re.compile(r"([^\]])-(.)|(.)", re.DOTALL)


def glob_pattern(glob: str) -> str:
    """SQLite's GLOB as a regular expression that Python and PostgreSQL read alike, for whole
    strings: `*` any characters, `?` one, `[a-z]` and `[^a-z]` sets. An open `[` fits nothing."""
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
