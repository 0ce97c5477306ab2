"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["lexical", "dense", "hybrid"]


@dataclass(frozen=True, slots=True)
class Leg:
    """What one way of searching says of a chunk; rank counts from 1."""

    rank: int
    score: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage: `text` is characters `start` to `end` of the document whose text has the SHA-256
    `hash`. legs: by name, of the best chunk in it. score orders hits of one search, no more."""

    chunk: int
    doc_id: str
    doc: str
    hash: str
    start: int
    end: int
    text: str
    headings: tuple[str, ...]
    score: float
    legs: dict[str, Leg]
    page: int | None = None
    collection: str = ""

    def as_dict(self) -> dict[str, object]:
        legs = {name: {"rank": leg.rank, "score": leg.score} for name, leg in self.legs.items()}
        return {
            "doc_id": self.doc_id,
            "doc": self.doc,
            "hash": self.hash,
            "start": self.start,
            "end": self.end,
            "page": self.page,
            "headings": list(self.headings),
            "score": self.score,
            "legs": legs,
            "text": self.text,
        }
