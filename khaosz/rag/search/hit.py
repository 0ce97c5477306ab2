"""The passages that a search returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Mode = Literal["lexical", "dense", "hybrid"]


@dataclass(frozen=True, slots=True)
class RetrieverScore:
    """Rank, from 1, and score of a chunk in the results of one retriever."""

    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage: `text` is characters `start` to `end` of the document whose text has the SHA-256
    `hash`. legs: by retriever ("lexical", "dense", "rerank"), for the best chunk in the passage.
    Scores are only comparable within one search."""

    chunk: int
    doc_id: str
    doc: str
    hash: str
    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    score: float
    legs: dict[str, RetrieverScore]
    page: int | None = None
    collection: str = ""

    def as_dict(self) -> dict[str, object]:
        return {
            "doc_id": self.doc_id,
            "doc": self.doc,
            "hash": self.hash,
            "start": self.start,
            "end": self.end,
            "page": self.page,
            "headings": list(self.headings),
            "score": self.score,
            "legs": {name: asdict(result) for name, result in self.legs.items()},
            "text": self.text,
        }
