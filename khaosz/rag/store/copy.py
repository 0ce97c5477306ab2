"""Copy a whole knowledge base to another store, and compare the copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from khaosz.errors import DataError
from khaosz.rag.store.records import COUNTED, NewDocument, SourceFile
from khaosz.rag.store.sql import Store

_SOURCES = 64  # per transaction, at most
_CHARACTERS = 4_000_000  # per transaction, about


def copy_store(
    source: Store, target: Store, on_source: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Copy everything in `source` to the empty `target`, read it back, compare, and return the
    counts. `source` is not changed. Chunk numbers are new; order, texts, vectors and hashes are the
    same.

    on_source: called with the number of sources copied and their total. An interrupted copy
    continues when it is called again; until it is complete, `target` cannot be opened as a
    knowledge base. Raises `DataError` for a target with other contents, and a copy that differs.
    """
    origin = source.where
    if (earlier := source.get("moving")) is not None:
        raise DataError(
            f"{origin} is an incomplete copy of {earlier}", hint="finish that move first"
        )
    continued = target.get("moving") == origin
    if not continued and target.counts()["sources"]:
        raise DataError(f"{target.where} is not empty", hint="move to a new file or schema")
    with source.reading():
        settings = _settings(source)
        with target.writing():
            if not continued:
                # An emptied target may have an index for vectors of another length.
                target.forget_vectors()
            for key in _settings(target).keys() - settings.keys():
                target.unset(key)
            for key, value in {**settings, "moving": origin}.items():
                target.set(key, value)
        _remove_stale(source, target)
        counts = source.counts()
        expected: list[bytes] = []
        batch: list[tuple[str, SourceFile, list[NewDocument]]] = []
        characters = chunks = 0
        for done, (collection, file) in enumerate(source.sources(), 1):
            documents = source.contents(collection, file.path)
            expected.append(_digest(collection, file, documents))
            chunks += sum(len(document.chunks) for document in documents)
            if target.source(collection, file.path) is None:
                batch.append((collection, file, documents))
                characters += sum(document.length for document in documents)
            if len(batch) >= _SOURCES or characters >= _CHARACTERS:
                _write(target, batch)
                batch, characters = [], 0
            if on_source is not None:
                on_source(done, counts["sources"])
        _write(target, batch)
    with target.reading():
        copied = [
            _digest(collection, file, target.contents(collection, file.path))
            for collection, file in target.sources()
        ]
        same = sorted(copied) == sorted(expected) and _settings(target) == settings
        same &= target.chunk_count == target.counts()["chunks"] == chunks
    if not same:
        raise DataError(
            f"{target.where} differs from what {origin} was when the move started",
            hint="one of them may have been written meanwhile; move again, to an empty place",
        )
    with target.writing():
        target.unset("moving")
    return counts


def _settings(store: Store) -> dict[str, str]:
    return {k: v for k, v in store.settings().items() if k not in COUNTED | {"moving"}}


def _write(target: Store, batch: list[tuple[str, SourceFile, list[NewDocument]]]) -> None:
    with target.writing():
        for part in batch:
            target.replace(*part)


def _remove_stale(source: Store, target: Store) -> None:
    """Remove what an interrupted copy wrote and the source has changed since."""
    stale = [
        (collection, file.path)
        for collection, file in target.sources()
        if source.source(collection, file.path) != file
    ]
    with target.writing():
        for collection, path in stale:
            target.remove_source(collection, path)


def _digest(collection: str, file: SourceFile, documents: Sequence[NewDocument]) -> bytes:
    """SHA-256 of everything that a store has of a source, including all bits of the vectors."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(json.dumps(values).encode() + b"\n")

    add(collection, file.path, file.size, file.mtime_ns, file.sha256)
    for d in documents:
        metadata = sorted(d.metadata.items())
        add(d.doc_id, d.name, d.hash, d.length, d.pages, metadata, len(d.chunks))
        for chunk in d.chunks:
            vector = b"" if chunk.vector is None else chunk.vector.astype(np.float32).tobytes()
            add(chunk.start, chunk.end, chunk.text, chunk.headings, vector.hex())
    return digest.digest()
