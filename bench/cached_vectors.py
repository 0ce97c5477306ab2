"""Vectors of many texts, computed once and cached: an hour of work that three benches need."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from khaosz.rag.models.embedders import open_embedder
from khaosz.rag.models.protocols import Embedder

_PART = 512  # texts between two saves


def cached_embedder(name: str, folder: Path) -> CachedVectors:
    return CachedVectors(open_embedder(name), folder)


class CachedVectors:
    """An embedder whose vectors are cached in `folder`; an interrupted run resumes."""

    def __init__(self, embedder: Embedder, folder: Path) -> None:
        self._embedder = embedder
        self.name, self.good_cosine = embedder.name, embedder.good_cosine
        key = hashlib.sha256(embedder.name.encode()).hexdigest()[:12]
        self._folder = folder / f"vectors-{key}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[bytes, np.ndarray] = {}
        for path in sorted(self._folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as part:
                keys, vectors = part["keys"], part["vectors"]
            self._known |= {bytes(k): v for k, v in zip(keys, vectors, strict=True)}

    @property
    def dimension(self) -> int:
        return self._embedder.dimension

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded("passage", texts)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._embedded("query", texts)

    def _embedded(self, kind: str, texts: Sequence[str]) -> np.ndarray:
        keys = [hashlib.sha256(f"{kind}:{text}".encode()).digest() for text in texts]
        missing = [at for at, key in enumerate(keys) if key not in self._known]
        start = time.perf_counter()
        for first in range(0, len(missing), _PART):
            some = missing[first : first + _PART]
            ask = self._embedder.passages if kind == "passage" else self._embedder.queries
            vectors = ask([texts[at] for at in some])
            self._known |= {keys[at]: v for at, v in zip(some, vectors, strict=True)}
            path = self._folder / f"{keys[some[0]].hex()}.npz"
            part = path.with_suffix(".partial")
            with part.open("wb") as file:
                raw = np.array([np.frombuffer(keys[at], np.uint8) for at in some])
                np.savez(file, keys=raw, vectors=vectors)
            part.replace(path)
            rate = (first + len(some)) / (time.perf_counter() - start)
            print(f"  {first + len(some):,} of {len(missing):,}, {rate:.1f}/s", file=sys.stderr)
        return np.array([self._known[key] for key in keys], np.float32)
