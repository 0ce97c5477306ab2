"""Embedders and rerankers of a service: named at the start, opened when they are first used."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from khaosz.errors import ConfigError
from khaosz.rag.models.embedders import open_embedder
from khaosz.rag.models.protocols import Embedder, Reranker
from khaosz.rag.models.rerankers import open_reranker


class SharedEmbedder:
    """One embedder for many threads: it is used by one at a time."""

    def __init__(self, inner: Embedder) -> None:
        self._inner, self._lock = inner, threading.Lock()
        self.name, self.good_cosine = inner.name, inner.good_cosine

    @property
    def dimension(self) -> int:
        return self._inner.dimension

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """As `Embedder.passages`."""
        with self._lock:
            return self._inner.passages(texts)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `Embedder.queries`."""
        with self._lock:
            return self._inner.queries(texts)

    def tokens(self, texts: Sequence[str]) -> int:
        """As `Embedder.tokens`."""
        with self._lock:
            return self._inner.tokens(texts)


class SharedReranker:
    def __init__(self, inner: Reranker) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """As `Reranker.scores`."""
        with self._lock:
            return self._inner.scores(query, passages)


class UnknownName(Exception):
    """`kind` "embedder" or "reranker", the name that was asked for, and those that there are."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        super().__init__(kind, name, known)
        self.kind, self.name, self.known = kind, name, list(known)


class RetrievalModels:
    """Safe to share between threads."""

    def __init__(self, embedders: Sequence[str] = (), rerankers: Sequence[str] = ()) -> None:
        """NAME=SOURCE each, SOURCE as `open_embedder` and `open_reranker` take it; a source alone
        is named after itself. Raises `ConfigError` for a name that stands twice."""
        self.embedders = _sources(embedders, "--embedder")
        self.rerankers = _sources(rerankers, "--reranker")
        if both := self.embedders.keys() & self.rerankers.keys():
            raise ConfigError(f"an embedder and a reranker are both named {min(both)!r}")
        self._lock = threading.Lock()
        self._embedders: dict[str, SharedEmbedder] = {}
        self._rerankers: dict[str, SharedReranker] = {}

    def embedder(self, name: str) -> SharedEmbedder:
        """Raises `UnknownName`, and `ConfigError` or `ModelError` when it can't be opened."""
        if name not in self.embedders:
            raise UnknownName("embedder", name, list(self.embedders))
        with self._lock:  # asked for twice at once it is opened once
            if name not in self._embedders:
                self._embedders[name] = SharedEmbedder(open_embedder(self.embedders[name]))
            return self._embedders[name]

    def reranker(self, name: str) -> SharedReranker:
        """Raises as `embedder` does."""
        if name not in self.rerankers:
            raise UnknownName("reranker", name, list(self.rerankers))
        with self._lock:
            if name not in self._rerankers:
                self._rerankers[name] = SharedReranker(open_reranker(self.rerankers[name]))
            return self._rerankers[name]


def _sources(given: Sequence[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in given:
        name, equals, source = each.partition("=")
        if not equals or "/" in name or Path(each).exists():  # a source alone; URLs may have a =
            name, source = Path(each).name, each
        if not name or not source:
            raise ConfigError(f"{option} {each!r} is not NAME=SOURCE")
        if name in found:
            raise ConfigError(f"{option}: two are named {name!r}", hint="NAME=SOURCE names one")
        found[name] = source
    return found
