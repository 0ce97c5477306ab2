"""BM25 over a knowledge base, right for Chinese and bounded in time.

Of a million chunks, half a million contain 的: ranking all of them takes longer than a reader
waits. So the rarest terms of a query are looked up first, until `BUDGET` postings have been read;
the chunks with most of their weight are then scored exactly, by every term. In a knowledge base
where no query reaches the budget this is plain BM25.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import accumulate

import numpy as np

from khaosz.rag.scripts import to_simplified, to_traditional
from khaosz.rag.store.records import indexed_text
from khaosz.rag.store.sql import Store
from khaosz.rag.terms import is_character, term_counter, terms

K1, B = 1.2, 0.75
SINGLE = 0.5  # weight of a Chinese character, whose pairs count too (CMRC 2018: .984 to .986)
BUDGET = 20_000  # postings read per query
# In questions and in every text. Pairs of Chinese characters with one of these are common too.
_COMMON = frozenset(
    terms(
        "a an and are as at be by can could did do does for from had has have how i if in is it its"
        " me my of on or should tell that the their there they this to was we were what when where"
        " which who why will with would you your about all also any after before between during"
        " each every far find first get give go hold into keep know last long made make many mean"
        " more most much name need next no not often other out over own per put s same so"
        " some take than then through under up use used work 的 了 是 在 有 和 与 或 不 我 你 他 她"
        " 它 们 这 那 哪 谁 什 么 怎 样 如 何 为 多 少 几 吗 呢 请 问 吧 其 及 对 以 个 会 能 可 被"
        " 把 从 候 时 办 就 都 也 还 很 最 每 要"
    )
)
CANDIDATES = 150  # chunks scored exactly, at least; 120 to 200 give the same results


def lexical_search(
    store: Store, query: str, limit: int, allowed: np.ndarray | None = None
) -> list[tuple[int, float]]:
    """Chunk numbers and BM25 scores (Robertson and Zaragoza 2009, 3.2.3), best first.

    allowed: ascending int64 numbers of the chunks to search; None for all.
    """
    query_terms = _query_terms(query)
    frequency = store.document_frequencies(list(query_terms))
    if not frequency:
        return []
    total = max(store.chunk_count, 1)
    weight = {t: query_terms[t] * _weight(t, count, total) for t, count in frequency.items()}
    candidates = _candidates(store, frequency, weight, max(CANDIDATES, limit), allowed)
    average = max(store.term_count / total, 1.0)
    count_terms = term_counter(weight)
    scored = []
    for chunk in store.chunks(candidates.tolist()):
        counts = count_terms(indexed_text(chunk.headings, chunk.text))
        norm = K1 * (1 - B + B * chunk.terms / average)
        score = sum(
            weight[term] * count * (K1 + 1) / (count + norm) for term, count in counts.items()
        )
        scored.append((chunk.id, score))
    scored.sort(key=lambda pair: (-pair[1], pair[0]))
    return scored[:limit]


def _query_terms(query: str) -> Counter[str]:
    """How often the query has each term, written in simplified or in traditional characters: the
    documents may be in either."""
    counts = Counter(terms(query))
    for variant in {to_simplified(query), to_traditional(query)} - {query}:
        counts |= Counter(terms(variant))
    return counts


def _weight(term: str, chunks: int, total: int) -> float:
    """Inverse document frequency, never below zero."""
    weight = math.log(1 + (total - chunks + 0.5) / (chunks + 0.5))
    return SINGLE * weight if is_character(term) else weight


def is_common(term: str) -> bool:
    """Whether the term is in questions and texts of every subject."""
    return term in _COMMON or (len(term) == 2 and bool(_COMMON.intersection(term)))


def _candidates(
    store: Store,
    frequency: dict[str, int],
    weight: dict[str, float],
    limit: int,
    allowed: np.ndarray | None,
) -> np.ndarray:
    """The chunks with the largest sums of weights over the rarest terms."""
    ranked = sorted(frequency, key=lambda term: frequency[term])
    read = accumulate(frequency[term] for term in ranked)
    first = max(1, sum(total <= BUDGET for total in read))
    numbers: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    # All terms within the budget at once, then one by one until an allowed chunk matches: a filter
    # may exclude every chunk with the rare terms.
    for group in (ranked[:first], *([term] for term in ranked[first:])):
        if any(map(len, numbers)):
            break
        for term, rows in zip(group, store.postings(group), strict=True):
            if allowed is not None:
                rows = rows[np.isin(rows, allowed, assume_unique=True)]
            numbers.append(rows)
            weights.append(np.full(len(rows), weight[term]))
    distinct, which = np.unique(np.concatenate(numbers), return_inverse=True)
    sums = np.bincount(which, np.concatenate(weights), len(distinct))
    if len(distinct) > limit:
        distinct = distinct[np.argpartition(-sums, limit)[:limit]]
    return distinct
