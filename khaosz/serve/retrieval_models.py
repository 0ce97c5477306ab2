"""Embedders and rerankers of a service, opened on first use."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from khaosz.errors import ConfigError, KhaoszError, ModelError
from khaosz.rag.models.embedders import check_embedder, open_embedder
from khaosz.rag.models.protocols import Embedder, Reranker
from khaosz.rag.models.rerankers import check_reranker, open_reranker


class SharedEmbedder:
    """An embedder that threads use one at a time."""

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
    """A reranker that threads use one at a time."""

    def __init__(self, inner: Reranker) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """As `Reranker.scores`."""
        with self._lock:
            return self._inner.scores(query, passages)


class UnknownName(Exception):
    """`kind`: "embedder" or "reranker"; `known`: the available names."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        super().__init__(kind, name, known)
        self.kind, self.name, self.known = kind, name, list(known)


class Unusable(ModelError):
    """A model that cannot be opened. `kind`: "embedder" or "reranker"."""

    def __init__(self, kind: str, name: str, error: KhaoszError) -> None:
        super().__init__(f"{kind} {name!r}: {error}", hint=error.hint)
        self.kind, self.name = kind, name


@contextmanager
def _usable(kind: str, name: str) -> Iterator[None]:
    try:
        yield
    except KhaoszError as error:
        raise Unusable(kind, name, error) from error


class RetrievalModels:
    """Embedders and rerankers by name. Thread-safe."""

    def __init__(self, embedders: Sequence[str] = (), rerankers: Sequence[str] = ()) -> None:
        """Each is NAME=SOURCE, SOURCE as for `open_embedder` and `open_reranker`; a source alone is
        named after itself. Raises `ConfigError` for a duplicate name."""
        self.embedders = _sources(embedders, "--embedder")
        self.rerankers = _sources(rerankers, "--reranker")
        if both := self.embedders.keys() & self.rerankers.keys():
            raise ConfigError(f"an embedder and a reranker are both named {min(both)!r}")
        self._lock = threading.Lock()
        self._embedders: dict[str, SharedEmbedder] = {}
        self._rerankers: dict[str, SharedReranker] = {}

    def check(self) -> None:
        """Raises `ConfigError` for a model that could not be opened on first use. Loads none."""
        for option, sources, check in (
            ("--embedder", self.embedders, check_embedder),
            ("--reranker", self.rerankers, check_reranker),
        ):
            for name, source in sources.items():
                try:
                    check(source)
                except KhaoszError as error:
                    shown = source if name == Path(source).name else f"{name}={source}"
                    raise ConfigError(f"{option} {shown}: {error}", hint=error.hint) from error

    def embedder(self, name: str) -> SharedEmbedder:
        """Raises `UnknownName`, and `Unusable` when it cannot be opened."""
        if name not in self.embedders:
            raise UnknownName("embedder", name, list(self.embedders))
        with self._lock:  # concurrent first requests open it once
            if name not in self._embedders:
                with _usable("embedder", name):
                    self._embedders[name] = SharedEmbedder(open_embedder(self.embedders[name]))
            return self._embedders[name]

    def reranker(self, name: str) -> SharedReranker:
        """Raises as `embedder` does."""
        if name not in self.rerankers:
            raise UnknownName("reranker", name, list(self.rerankers))
        with self._lock:
            if name not in self._rerankers:
                with _usable("reranker", name):
                    self._rerankers[name] = SharedReranker(open_reranker(self.rerankers[name]))
            return self._rerankers[name]


def _sources(arguments: Sequence[str], option: str) -> dict[str, str]:
    sources: dict[str, str] = {}
    for each in arguments:
        name, equals, source = each.partition("=")
        if not equals or "/" in name or Path(each).exists():  # a source alone; URLs may contain =
            name, source = Path(each).name, each
        if not name or not source:
            raise ConfigError(f"{option} {each!r} is not NAME=SOURCE")
        if name in sources:
            raise ConfigError(f"{option}: two are named {name!r}", hint="NAME=SOURCE names one")
        sources[name] = source
    return sources
