"""Retrieval accuracy: each query of a file of pairs against all passages of the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from khaosz.config import ColumnsConfig
from khaosz.data.records.pairs import Texts, to_texts
from khaosz.data.records.readers import expand_inputs
from khaosz.data.records.report import (
    InputReport,
    open_reports,
    refuse_unread,
    summary,
    usable_records,
    worst_reason,
)
from khaosz.errors import DataError
from khaosz.rag.models.protocols import Embedder
from khaosz.rag.search.bm25 import lexical_search
from khaosz.rag.store import open_store
from khaosz.rag.store.records import NewChunk, NewDocument, SourceFile

_BATCH = 64  # texts per call of an embedder


@dataclass(frozen=True)
class RetrievalAccuracy:
    """accuracy: fraction of queries whose passage ranks first. mrr: mean of 1 / its rank. Other
    passages that answer the query are ignored; passages with an equal score rank before it.
    skipped: records that were not used; `report` has the reasons as lines."""

    found_by: str
    accuracy: float
    mrr: float
    queries: int
    passages: int
    skipped: int
    report: tuple[str, ...] = ()


def retrieval_accuracy(
    file: Path,
    embedder: Embedder | None = None,
    *,
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> RetrievalAccuracy:
    """Rank by cosine with an embedder, by a knowledge base's BM25 without one.

    Raises `DataError` when the file has no pairs, and when more than 1 % of its records cannot be
    read, unless they are allowed.
    """
    inputs = open_reports(expand_inputs([file]))
    records = [record for entry in inputs for record in _records(entry, columns)]
    read = sum(entry.records for entry in inputs)
    if not records:
        raise DataError(f"no pairs in {read} records of {file}{worst_reason(inputs)}")
    refuse_unread(inputs, allow_unread)
    numbers: dict[str, int] = {}
    for text in chain.from_iterable((*r.positives, *r.negatives) for r in records):
        numbers.setdefault(text, len(numbers))
    answers: dict[str, set[int]] = {}
    for record in records:
        relevant = answers.setdefault(record.query, set())
        relevant.update(numbers[text] for text in record.positives)
    queries, passages = list(answers), list(numbers)
    if embedder is None:
        scored = _bm25_scores(queries, passages)
    else:
        scored = _cosine_scores(queries, passages, embedder)
    rank_list = []
    for query, scores in zip(queries, scored, strict=True):
        for passage in answers[query]:
            before = scores >= scores[passage]
            before[list(answers[query])] = False
            rank_list.append(1 + int(before.sum()))
    ranks = np.array(rank_list)
    return RetrievalAccuracy(
        "bm25" if embedder is None else embedder.name,
        round(float((ranks == 1).mean()), 4),
        round(float((1 / ranks).mean()), 4),
        len(ranks),
        len(passages),
        read - len(records),
        tuple(summary(inputs)),
    )


def _records(entry: InputReport, columns: ColumnsConfig | None) -> Iterator[Texts]:
    for line, record in usable_records(entry, columns):
        with entry.skipping(line):
            texts = to_texts(record, columns)
            entry.kept += 1
            yield texts


def _cosine_scores(
    queries: Sequence[str], passages: Sequence[str], embedder: Embedder
) -> Iterator[np.ndarray]:
    """Scores of all passages, (P,) float, for each query."""
    matrix = np.concatenate([embedder.passages(batch) for batch in _batches(passages)])
    for batch in _batches(queries):
        yield from embedder.queries(batch) @ matrix.T


def _bm25_scores(queries: Sequence[str], passages: Sequence[str]) -> Iterator[np.ndarray]:
    """Scores of all passages, (P,) float, for each query; 0 without a common word."""
    number = {text: i for i, text in enumerate(passages)}
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(open_store(Path(folder) / "passages.kb")) as store,
    ):
        chunks = [NewChunk(0, len(text), text, ()) for text in passages]
        source = SourceFile("passages", 0, 0, "")
        with store.writing():
            store.replace("default", source, [NewDocument("", "passages", "", 0, chunks)])
        for query in queries:
            scores = np.zeros(len(passages))
            ranked = dict(lexical_search(store, query, len(passages)))
            for chunk in store.chunks(list(ranked)):
                scores[number[chunk.text]] = ranked[chunk.id]
            yield scores


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(texts), _BATCH):
        yield texts[first : first + _BATCH]
