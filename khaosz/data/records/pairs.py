"""Query-passage records of the common layouts, brought to token ids for contrastive training.

Understood are our own `{"query", "positive", "negatives"}`, sentence-transformers' columns
`anchor`, `positive`, `negative` (or `negative_1`, `negative_2`, ...) and the lists `pos` and `neg`
of BGE's records. A record with several positives is as many pairs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.data.records.readers import Skip, expand_inputs, open_source, parsed
from khaosz.data.records.report import InputReport, text_hash, worst_reason
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import DataError

LEAST_QUERY, LEAST_PASSAGE = 8, 16  # characters; what is shorter stands for too many others


MOST_QUERY = 300  # what is longer is a table or code, and no question


KEPT = 0.1  # share of the sentences that stay in their passage


def inverse_cloze(parts: Sequence[str], glue: str, rng: random.Random) -> tuple[str, str] | None:
    """A sentence and the passage it was taken from (the inverse cloze task, Lee et al. 2019,
    arXiv:1906.00300), None where one would be too short. In one of ten the sentence stays, so that
    equal words still count."""
    if len(parts) < 2:
        return None
    chosen = rng.randrange(len(parts))
    rest = parts if rng.random() < KEPT else [p for i, p in enumerate(parts) if i != chosen]
    query, passage = parts[chosen].strip(), glue.join(rest).strip()
    fits = LEAST_QUERY <= len(query) <= MOST_QUERY
    if not fits or len(passage) < LEAST_PASSAGE or query == passage:
        return None
    return query, passage


_QUERY = ("query", "anchor")
_POSITIVE = ("positive", "positives", "pos")
_NEGATIVE = re.compile(r"negatives?|neg|negative_\d+")


@dataclass(frozen=True)
class Texts:
    """One record: a query, the passages that answer it, and hard negatives that do not."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass
class TextPairs:
    """Pairs as token ids: pair i is `queries[i]` with `passages[positive[i]]`.

    Every distinct passage, as the model sees it, stands once in `passages`. `negatives[i]` are the
    hard ones of pair i. `answers[i]` are all passages that answer its query in any record: none
    of them may serve as a negative of it.
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
    """Texts to ids as an embedder reads them: prefix, begin token where documents have one, and at
    most `max_length` tokens."""

    tokenizer: Tokenizer
    max_length: int
    query_prefix: str = ""
    passage_prefix: str = ""

    def query(self, text: str) -> np.ndarray:
        """(T,) int32, whole: `cut` shortens it."""
        return self._ids(self.query_prefix + text)

    def passage(self, text: str) -> np.ndarray:
        return self._ids(self.passage_prefix + text)

    def cut(self, ids: np.ndarray) -> np.ndarray:
        return ids[: self.max_length]

    def _ids(self, text: str) -> np.ndarray:
        begin = [self.tokenizer.bos_id] if self.tokenizer.begins_with_bos else []
        return np.array([*begin, *self.tokenizer.encode(text)], np.int32)


@dataclass
class TextPairsReport:
    """`kept` and `validation` count pairs, `cut_queries` and `cut_passages` the texts of kept pairs
    that are longer than `max_length` tokens and lost their ends."""

    max_length: int
    inputs: list[InputReport]
    kept: int = 0
    validation: int = 0
    negatives: int = 0
    cut_queries: int = 0
    cut_passages: int = 0

    def lines(self) -> list[str]:
        """The report for people."""
        out = [line for entry in self.inputs for line in entry.lines()]
        negatives = f" with {self.negatives:,} hard negatives" if self.negatives else ""
        out.append(f"{self.kept:,} pairs{negatives}, {self.validation:,} of them for validation")
        if self.cut_queries or self.cut_passages:
            out.append(
                f"cut to {self.max_length} tokens: {self.cut_queries:,} queries,"
                f" {self.cut_passages:,} passages"
            )
        return out


def to_texts(record: dict[str, Any]) -> Texts:
    """Raises DataError with a short reason for an unknown layout, for what is not text, and for a
    negative that is a positive."""
    given = {key: value for key, value in record.items() if value is not None}
    query = next((given[key] for key in _QUERY if key in given), None)
    found = next(((key, given[key]) for key in _POSITIVE if key in given), None)
    if query is None or found is None:
        missing = "query" if query is None else "positive"
        raise DataError(f"no {missing} among the keys ({', '.join(map(str, given))})")
    if not isinstance(query, str) or not query.strip():
        raise DataError("query is empty" if isinstance(query, str) else "query is not text")
    positives = _listed(found[0], found[1])
    if not positives:
        raise DataError(f"{found[0]} is empty")
    named = [key for key in given if _NEGATIVE.fullmatch(str(key))]
    negatives = tuple(dict.fromkeys(chain(*(_listed(key, given[key]) for key in named))))
    if set(positives) & set(negatives):
        raise DataError("a negative is the positive")
    return Texts(query, positives, negatives)


def load_text_pairs(
    paths: Iterable[str | Path],
    encoder: TextEncoder,
    *,
    negatives: int = 4,
    val_fraction: float = 0.0,
    seed: int = 0,
) -> tuple[TextPairs, TextPairs, TextPairsReport]:
    """All usable pairs, those held out beside them, and what became of the records. The hash of a
    positive and `seed` say whether its pairs are held out: such a passage answers nothing that is
    trained on. At most the first `negatives` of a record are taken.

    Raises DataError when no pair is left to train on.
    """
    assert 0.0 <= val_fraction < 1.0, val_fraction
    report = TextPairsReport(
        encoder.max_length, [InputReport(str(p)) for p in expand_inputs(paths)]
    )
    train, held_out = TextPairs(), TextPairs()
    for entry in report.inputs:
        for batch in open_source(entry.path):
            unread = [(line, Skip(reason)) for line, reason in batch.skipped]
            for line, record in chain(unread, parsed(batch)):
                entry.records += 1
                with entry.skipping(line):
                    if isinstance(record, Skip):
                        raise DataError(record.reason)
                    texts = to_texts(record)
                    query = encoder.query(texts.query)
                    against = [encoder.passage(text) for text in texts.negatives[:negatives]]
                    for text in texts.positives:
                        positive = encoder.passage(text)
                        key = text_hash(f"{seed} {text.strip()}")
                        out = int.from_bytes(key) < val_fraction * 2.0 ** (8 * len(key))
                        (held_out if out else train).add(
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
        total = sum(entry.records for entry in report.inputs)
        raise DataError(
            f"nothing to train on in {total} records{worst_reason(report.inputs)}",
            hint='a record is {"query": ..., "positive": ..., "negatives": [...]}',
        )
    report.kept, report.validation = len(train) + len(held_out), len(held_out)
    return train, held_out, report


def _listed(key: str, value: Any) -> tuple[str, ...]:
    """One text or a list of them."""
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{key} is neither text nor a list of texts")
        if not text.strip():
            raise DataError(f"{key} has an empty text")
    return tuple(dict.fromkeys(texts))
