"""The records that a store of a knowledge base reads and writes.

Each store numbers its chunks and documents itself, ascending in the order of writing. What a
citation names (hash, start, end) is the same in every store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

COUNTED = frozenset({"version", "chunks", "terms", "generation"})  # settings a store writes itself

# Keys in the metadata of a document.
NAMED = "added_by_name"  # its file was added by itself, not with a folder
RECORD_LINE = "record_line"  # it is that line of a JSONL file


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


def indexed_text(headings: Sequence[str], text: str) -> str:
    """What lexical search indexes: the headings above a chunk describe it too."""
    return "\n".join((*headings, text))


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
