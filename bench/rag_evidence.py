"""Evidence: how much of what answers a question stands in the five chunks that BM25 finds.

English: the corpora of Chroma's chunking evaluation that lie in shared/data/chunking; recall and
IoU of characters as they define them (Smith and Troynikov, 2024, "Evaluating Chunking Strategies
for Retrieval"). Chinese: the passages of CMRC 2018 as one text and the answers to its questions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from bench.rag_corpus import Question

Spans = dict[str, list[tuple[int, int]]]


class Okapi:
    """BM25 (Robertson et al., TREC-3, 1994), k1 1.5 and b 0.75, over words."""

    def __init__(self, texts: Sequence[str], words: Callable[[str], list[str]]) -> None:
        self.words = words
        counts = [Counter(words(text)) for text in texts]
        lengths = [sum(count.values()) for count in counts]
        average = sum(lengths) / len(lengths)
        seen = Counter(word for count in counts for word in count)
        self.postings: dict[str, list[tuple[int, float]]] = {}
        for index, count in enumerate(counts):
            norm = 1.5 * (0.25 + 0.75 * lengths[index] / average)
            for word, n in count.items():
                idf = math.log(1 + (len(texts) - seen[word] + 0.5) / (seen[word] + 0.5))
                self.postings.setdefault(word, []).append((index, idf * n * 2.5 / (n + norm)))

    def top(self, question: str, k: int) -> list[int]:
        scores: Counter[int] = Counter()
        for word in self.words(question):
            for index, score in self.postings.get(word, ()):
                scores[index] += score
        return sorted(scores, key=lambda index: (-scores[index], index))[:k]


def words_of(language: str) -> Callable[[str], list[str]]:
    """Lowercase words; in Chinese characters and their pairs, for everyone alike."""
    if language == "en":
        return lambda text: re.findall(r"\w+", text.lower())
    from khaosz.rag.terms import terms

    return terms


def locate(text: str, chunks: Sequence[str]) -> list[tuple[int, int]]:
    """Where the chunks stand in the text; peers may have trimmed them."""
    spans, at = [], 0
    for chunk in chunks:
        start = text.find(chunk, at)
        if start < 0:
            start = text.find(chunk)
        assert start >= 0, chunk[:80]
        spans.append((start, start + len(chunk)))
        at = start + 1
    return spans


def evidence(
    spans: Spans, corpora: dict[str, tuple[str, list[Question]]], language: str, k: int = 5
) -> dict[str, Any]:
    """Recall, precision and IoU in percent: means over the questions of all corpora."""
    pieces = [(name, a, b) for name, found in spans.items() for a, b in found]
    index = Okapi([corpora[name][0][a:b] for name, a, b in pieces], words_of(language))
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for name in spans:
        for question, wanted in corpora[name][1]:
            found = [pieces[i] for i in index.top(question, k)]
            hit: set[int] = set()
            for corpus, a, b in found:
                if corpus == name:
                    for start, end in wanted:
                        hit.update(range(max(a, start), min(b, end)))
            relevant = set().union(*(range(start, end) for start, end in wanted))
            retrieved = sum(b - a for _, a, b in found)
            missed = len(relevant) - len(hit)
            rows.setdefault(name, []).append(
                (
                    len(hit) / len(relevant),
                    len(hit) / max(retrieved, 1),
                    len(hit) / (retrieved + missed),
                )
            )
    rows["all"] = [row for found in list(rows.values()) for row in found]
    result: dict[str, Any] = {
        name: [100 * sum(column) / len(found) for column in zip(*found, strict=True)]
        for name, found in rows.items()
    }
    result["chunks"] = len(pieces)
    result["mean"] = sum(b - a for _, a, b in pieces) / len(pieces)
    return result
