"""Query-passage records of the common layouts, converted to token ids for contrastive training.

Understood are our own `{"query", "positive", "negatives"}`, sentence-transformers' columns
`anchor`, `positive`, `negative` (or `negative_1`, `negative_2`, ...) and the lists `pos` and `neg`
of BGE's records. A record with several positives gives as many pairs. `inverse_cloze` makes pairs
of unlabelled text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.config import ColumnsConfig
from khaosz.data.records.layouts import Texts, read_record
from khaosz.data.records.readers import expand_inputs
from khaosz.data.records.report import (
    LoadReport,
    in_validation,
    nothing_to_train_on,
    open_reports,
    refuse_unread,
    usable_records,
)
from khaosz.data.tokenizer import Tokenizer

__all__ = ["TextEncoder", "TextPairs", "Texts", "inverse_cloze", "load_text_pairs", "to_texts"]

LEAST_QUERY, LEAST_PASSAGE = 8, 16  # characters; shorter texts are ambiguous
MOST_QUERY = 300  # characters; longer ones are tables or code
KEPT = 0.1  # share of the sentences that stay in their passage


@dataclass
class TextPairs:
    """Pairs as token ids: pair i is `queries[i]` with `passages[positive[i]]`.

    `passages` are distinct, as the model sees them. `negatives[i]` are the hard negatives of pair
    i. `answers[i]` are all passages that answer its query in any record: none of them may be used
    as a negative of it.
    """

    queries: list[np.ndarray] = field(default_factory=list)
    passages: list[np.ndarray] = field(default_factory=list)
    positive: list[int] = field(default_factory=list)
    negatives: list[tuple[int, ...]] = field(default_factory=list)
    answers: list[set[int]] = field(default_factory=list)
    _passage: dict[bytes, int] = field(default_factory=dict, repr=False)
    _answers: dict[bytes, set[int]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.queries)

    def add(self, query: np.ndarray, positive: np.ndarray, negatives: Sequence[np.ndarray]) -> None:
        number = self._number(positive)
        self.queries.append(query)
        self.positive.append(number)
        self.negatives.append(tuple(dict.fromkeys(map(self._number, negatives))))
        known = self._answers.setdefault(query.tobytes(), set())
        known.add(number)
        self.answers.append(known)  # one set for all pairs of this query

    def _number(self, passage: np.ndarray) -> int:
        number = self._passage.setdefault(passage.tobytes(), len(self.passages))
        if number == len(self.passages):
            self.passages.append(passage)
        return number


@dataclass(frozen=True)
class TextEncoder:
    """Texts to ids as an embedder reads them: prefix, what the tokenizer adds before and after a
    text, and at most `max_length` tokens."""

    tokenizer: Tokenizer
    max_length: int
    query_prefix: str = ""
    passage_prefix: str = ""

    def query(self, text: str) -> np.ndarray:
        """(T,) int32, untruncated; see `cut`."""
        return self._ids(self.query_prefix + text)

    def passage(self, text: str) -> np.ndarray:
        return self._ids(self.passage_prefix + text)

    def cut(self, ids: np.ndarray) -> np.ndarray:
        finish = self.tokenizer.finish_ids
        if len(ids) <= self.max_length or not finish:
            return ids[: self.max_length]
        return np.array([*ids[: self.max_length - len(finish)], *finish], np.int32)

    def _ids(self, text: str) -> np.ndarray:
        by = self.tokenizer
        return np.array([*by.begin_ids, *by.encode(text), *by.finish_ids], np.int32)


@dataclass
class TextPairsReport(LoadReport):
    """`cut_queries` and `cut_passages` count texts of kept pairs that were cut to `max_length`
    tokens."""

    max_length: int = 0
    negatives: int = 0
    cut_queries: int = 0
    cut_passages: int = 0

    def lines(self) -> list[str]:
        out = super().lines()
        negatives = f" with {self.negatives:,} hard negatives" if self.negatives else ""
        out.append(f"{self.kept:,} pairs{negatives}, {self.validation:,} of them for validation")
        if self.cut_queries or self.cut_passages:
            out.append(
                f"cut to {self.max_length} tokens: {self.cut_queries:,} queries,"
                f" {self.cut_passages:,} passages"
            )
        return out


def to_texts(record: Any, columns: ColumnsConfig | None = None) -> Texts:
    """Raises DataError with a short reason for an unknown layout, for values that are not text, and
    for a negative that is also a positive."""
    texts: Texts = read_record(record, ("passages",), columns)
    return texts


def load_text_pairs(
    paths: Iterable[str | Path],
    encoder: TextEncoder,
    *,
    negatives: int = 4,
    val_fraction: float = 0.0,
    seed: int = 0,
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> tuple[TextPairs, TextPairs, TextPairsReport]:
    """Training pairs, validation pairs and a report. The hash of a positive and `seed` decide
    whether its pairs are held out, so no held-out passage answers a training query. At most the
    first `negatives` of a record are used.

    Raises DataError when no pair is left to train on, and when more than 1 % of the records cannot
    be read, unless they are allowed.
    """
    assert 0.0 <= val_fraction < 1.0, val_fraction
    inputs = open_reports(expand_inputs(paths))
    report = TextPairsReport(inputs, max_length=encoder.max_length)
    train, held_out = TextPairs(), TextPairs()
    for entry in report.inputs:
        for line, record in usable_records(entry, columns):
            with entry.skipping(line):
                texts = to_texts(record, columns)
                query = encoder.query(texts.query)
                against = [encoder.passage(text) for text in texts.negatives[:negatives]]
                for text in texts.positives:
                    positive = encoder.passage(text)
                    pairs = held_out if in_validation(text.strip(), seed, val_fraction) else train
                    pairs.add(
                        encoder.cut(query),
                        encoder.cut(positive),
                        [encoder.cut(ids) for ids in against],
                    )
                    report.negatives += len(against)
                    report.cut_queries += len(query) > encoder.max_length
                    report.cut_passages += sum(
                        len(ids) > encoder.max_length for ids in (positive, *against)
                    )
                entry.kept += 1
    if not train.queries:
        raise nothing_to_train_on(
            report, 'a record is {"query": ..., "positive": ..., "negatives": [...]}'
        )
    refuse_unread(report.inputs, allow_unread)
    report.kept, report.validation = len(train) + len(held_out), len(held_out)
    return train, held_out, report


def inverse_cloze(parts: Sequence[str], glue: str, rng: random.Random) -> tuple[str, str] | None:
    """A sentence and the passage it was taken from (the inverse cloze task, Lee et al. 2019,
    arXiv:1906.00300), or None where one is too short. In one of ten the sentence stays in its
    passage, so that equal words still count."""
    if len(parts) < 2:
        return None
    chosen = rng.randrange(len(parts))
    rest = parts if rng.random() < KEPT else [p for i, p in enumerate(parts) if i != chosen]
    query, passage = parts[chosen].strip(), glue.join(rest).strip()
    fits = LEAST_QUERY <= len(query) <= MOST_QUERY
    if not fits or len(passage) < LEAST_PASSAGE or query == passage:
        return None
    return query, passage
