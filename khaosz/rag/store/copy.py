"""A whole base from one store to another, in either direction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from khaosz.errors import DataError
from khaosz.rag.store.protocol import COUNTED, NewDocument, SourceFile, Store

_SOURCES = 64  # written in one transaction, at most
_CHARACTERS = 4_000_000  # the same


def move(
    source: Store, target: Store, on_source: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Copy everything of `source` into the empty `target`, read it back, compare, and say how much
    it was. `source` stays as it is. Numbers of chunks are new; their order, texts, vectors and
    hashes are the same.

    Interrupted, it goes on when it is called again; until it is through, `target` is no base to
    others. Raises `DataError` for a target that holds something else, and for a copy that differs.
    """
    origin = source.where
    if (earlier := source.get("moving")) is not None:
        raise DataError(f"{origin} holds a part of {earlier}", hint="finish that move first")
    goes_on = target.get("moving") == origin
    if not goes_on and target.counts()["sources"]:
        raise DataError(
            f"{target.where} is not empty", hint="move to a new file, schema or collection name"
        )
    with source.reading():
        settings = _settings(source)
        with target.writing():
            if not goes_on:
                target.forget_vectors()  # and what was made for them: they may have another length
            for key in _settings(target).keys() - settings.keys():
                target.unset(key)
            for key, value in {**settings, "moving": origin}.items():
                target.set(key, value)
        _forget_others(source, target)
        counts = source.counts()
        wanted: list[bytes] = []
        batch: list[tuple[str, SourceFile, list[NewDocument]]] = []
        characters = chunks = 0
        for done, (collection, file) in enumerate(source.sources(), 1):
            documents = source.contents(collection, file.path)
            wanted.append(_digest(collection, file, documents))
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
        found = [
            _digest(collection, file, target.contents(collection, file.path))
            for collection, file in target.sources()
        ]
        same = sorted(found) == sorted(wanted) and _settings(target) == settings
        same &= target.chunk_count == target.counts()["chunks"] == chunks
    if not same:
        raise DataError(
            f"{target.where} is not what {origin} was when the move began",
            hint="was one of them written meanwhile? move again, to an empty place",
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


def _forget_others(source: Store, target: Store) -> None:
    """What an interrupted move has copied and the source has changed since."""
    stale = [
        (collection, file.path)
        for collection, file in target.sources()
        if source.source(collection, file.path) != file
    ]
    with target.writing():
        for collection, path in stale:
            target.remove_source(collection, path)


def _digest(collection: str, file: SourceFile, documents: Sequence[NewDocument]) -> bytes:
    """SHA-256 of all that a store keeps of a source, its vectors bit by bit."""
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
