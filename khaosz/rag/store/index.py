"""Nearest vectors: exact for small knowledge bases, by a usearch graph beside the file for large
ones. PostgreSQL searches on the server.

The graph can always be rebuilt from the vectors. It is saved with the state of the knowledge base
that it was built from, and rebuilt when the state differs or the graph is missing or damaged.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from khaosz.files import atomic_path, write_json
from khaosz.rag.store.sql import Store
from khaosz.rag.store.sqlite import SqliteStore

EXACT_UP_TO = 50_000  # vectors: 20 ms of one core at 384 dimensions
# An encoder's vectors have many near neighbours: usearch's defaults of 16, 128 and 64 find 94 % of
# the ten nearest of 50,000 passages. `python -m bench rag large`.
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH = 32, 128, 896
_MORE = 4  # times the limit is requested from the graph when only some chunks are allowed


@runtime_checkable
class VectorIndex(Protocol):
    @property
    def revision(self) -> int: ...

    def nearest(
        self,
        query: np.ndarray,
        limit: int,
        allowed: np.ndarray | None = None,
        *,
        collection: str | None = None,
        name: str | None = None,
    ) -> list[tuple[int, float]]:
        """Chunk numbers and cosines, best first. `allowed`: the numbers of the chunks that match
        `collection` and `name`, by which a server filters."""


def open_index(store: Store) -> VectorIndex:
    if isinstance(store, VectorIndex):
        return store
    assert isinstance(store, SqliteStore), store
    if store.vector_count > EXACT_UP_TO and importlib.util.find_spec("usearch") is not None:
        return GraphIndex(store)
    return ExactIndex(store)


class ExactIndex:
    """Compares every vector."""

    def __init__(self, store: Store) -> None:
        with store.reading():
            self.revision = store.revision
            self._numbers, self._matrix = store.vectors()

    def nearest(
        self, query: np.ndarray, limit: int, allowed: np.ndarray | None = None, **_: str | None
    ) -> list[tuple[int, float]]:
        if not len(self._numbers):  # the matrix may have no columns
            return []
        numbers, cosines = self._numbers, self._matrix @ query
        if allowed is not None:
            keep = np.isin(numbers, allowed, assume_unique=True)
            numbers, cosines = numbers[keep], cosines[keep]
        best = np.argsort(-cosines, kind="stable")[:limit]
        return [(int(numbers[i]), float(cosines[i])) for i in best]


class GraphIndex:
    """HNSW (Malkov and Yashunin 2016) in half precision, mapped from a file beside the store."""

    def __init__(self, store: SqliteStore) -> None:
        from usearch.index import Index

        self._dimension = store.dimension
        self._index: Any = Index(
            ndim=self._dimension, metric="cos", dtype="f16", connectivity=_CONNECTIVITY,
            expansion_add=_EXPANSION_ADD, expansion_search=_EXPANSION_SEARCH,
        )  # fmt: skip
        path = Path(f"{store.path}.usearch")
        with store.reading():
            self.revision = store.revision
            state = {
                "generation": self.revision,  # the key in existing files
                "count": store.vector_count,
                "dimension": self._dimension,
                "connectivity": _CONNECTIVITY,
            }
            if not self._open(path, state):
                self._build(store, path, state)

    def _open(self, path: Path, state: dict[str, int]) -> bool:
        try:
            if json.loads(_state_path(path).read_text()) != {**state, "bytes": path.stat().st_size}:
                return False
            self._index.view(str(path))
        except (OSError, ValueError, RuntimeError):
            return False
        return len(self._index) == state["count"] and self._index.ndim == self._dimension

    def _build(self, store: SqliteStore, path: Path, state: dict[str, int]) -> None:
        self._index.reset()
        for numbers, matrix in store.vector_blocks():
            self._index.add(numbers, matrix)
        # On a read-only medium the graph stays in memory.
        with contextlib.suppress(OSError, RuntimeError):
            with atomic_path(path) as partial:
                self._index.save(str(partial))
                _state_path(path).unlink(missing_ok=True)
            write_json(_state_path(path), {**state, "bytes": path.stat().st_size})

    def nearest(
        self, query: np.ndarray, limit: int, allowed: np.ndarray | None = None, **_: str | None
    ) -> list[tuple[int, float]]:
        requested = limit if allowed is None else limit * _MORE
        while True:
            matches = self._index.search(query, min(requested, len(self._index)))
            pairs = [(int(m.key), 1.0 - float(m.distance)) for m in matches]
            if allowed is not None:
                keep = np.isin(np.array([key for key, _ in pairs]), allowed)
                pairs = [pair for pair, kept in zip(pairs, keep, strict=True) if kept]
            enough = min(limit, len(self._index) if allowed is None else len(allowed))
            if len(pairs) >= enough or requested >= len(self._index):
                return pairs[:limit]
            requested *= _MORE


def _state_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
