"""What search needs of its models: `Embedder` and `Reranker`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from khaosz.errors import ModelError


class Reranker(Protocol):
    """A second look at few passages by a slower judge."""

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """float32 (passages,): higher is better."""


class Embedder(Protocol):
    """name: kept with a base; `open_embedder` opens it again. good_cosine: from where on a passage
    is about a query, or None where nobody has measured it."""

    name: str
    good_cosine: float | None

    @property
    def dimension(self) -> int: ...

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, D), rows of length 1."""

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """The same for questions; some models want another prefix before them."""

    def tokens(self, texts: Sequence[str]) -> int:
        """Read for passages, marks and prefixes included; 0 where nobody can say."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; raises `ModelError` for NaN and for zeros, which point nowhere."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise ModelError("the embedder gave a vector without a direction (zero, infinite or NaN)")
    return (vectors / lengths).astype(np.float32)
