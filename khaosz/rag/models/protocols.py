"""What retrieval and answers need of models: `Embedder`, `Reranker`, `ChatModel`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from khaosz.errors import ModelError

Messages = Sequence[dict[str, str]]
GoodCosine = float | Mapping[str, float] | None
T = TypeVar("T")


class Embedder(Protocol):
    """name: stored in a knowledge base; `open_embedder` opens the same model by it. good_cosine:
    the cosine from which a passage may be about a query, for all languages or by those of query
    and passage ("zh-en"); None if it was not measured."""

    name: str
    good_cosine: GoodCosine = None

    @property
    def dimension(self) -> int: ...

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """float32 (texts, D), rows of length 1."""

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """The same for questions; some models need another prefix for them."""
        return self.passages(texts)

    def tokens(self, texts: Sequence[str]) -> int:
        """Tokens read for passages, with special tokens and prefixes; 0 if unknown."""
        return 0


class Reranker(Protocol):
    """Scores the few passages that a search has found, by a slower model."""

    def scores(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """float32 (passages,): higher is better."""


class ChatModel(Protocol):
    """context: tokens of prompt and answer together."""

    context: int

    def count(self, messages: Messages) -> int:
        """Tokens of a prompt."""

    def stream(self, messages: Messages, max_tokens: int, temperature: float) -> Iterator[str]:
        """Pieces of an answer."""


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1. Raises `ModelError` for NaN and zeros, which have no direction."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise ModelError("the embedder gave a vector without a direction (zero, infinite or NaN)")
    return (vectors / lengths).astype(np.float32)


def flatten(groups: Iterable[Iterable[T]]) -> tuple[list[int], list[T]]:
    """(group numbers, items): of texts cut in windows, the text of each window, and the windows."""
    pairs = [(number, item) for number, group in enumerate(groups) for item in group]
    return [number for number, _ in pairs], [item for _, item in pairs]
